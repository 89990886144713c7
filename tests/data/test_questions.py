import pytest

from aki.data.sources.questions import yes_no_question


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("The cat is on the mat.", "Is the cat on the mat?"),
        ("The cat is on the mat", "Is the cat on the mat?"),
        # "is" inside words
        ("This is an island.", "Is this an island?"),
        ("The island is left of the boat.", "Is the island left of the boat?"),
        ("This disc is far from his list.", "Is this disc far from his list?"),
        ("The fish is parallel to the dish.", "Is the fish parallel to the dish?"),
        # other verbs
        ("The dogs are near the cat.", "Are the dogs near the cat?"),
        ("The horses were behind the car.", "Were the horses behind the car?"),
        ("The pizza has as a part the cheese.", "Does the pizza have as a part the cheese?"),
        ("The cats have tails.", "Do the cats have tails?"),
        ("The bed contains the cat.", "Does the bed contain the cat?"),
        ("The dish consists of rice.", "Does the dish consist of rice?"),
        ("The person touches the bus.", "Does the person touch the bus?"),
        ("The fish can swim.", "Can the fish swim?"),
        ("The cat has been fed.", "Has the cat been fed?"),
        ("The bus has red doors.", "Does the bus have red doors?"),
        # the verb of the statement, not of a clause in it
        ("The man who is standing is left of the dog.", "Is the man who is standing left of the dog?"),
        ("The vase that the flower is in is near the wall.", "Is the vase that the flower is in near the wall?"),
        ("A cat that has stripes faces the dog.", "Does a cat that has stripes face the dog?"),
        ("The bench is where the man is.", "Is the bench where the man is?"),
        # words that are verbs elsewhere
        ("The can is on the table.", "Is the can on the table?"),
        ("The bed covers are on the floor.", "Are the bed covers on the floor?"),
        ("The can contains the donut.", "Does the can contain the donut?"),
        ("The trash can faces the chair.", "Does the trash can face the chair?"),
        ("The can on the left is red.", "Is the can on the left red?"),
        ("The looks of the dog are odd.", "Are the looks of the dog odd?"),
        # names keep their capital
        ("London is in England.", "Is London in England?"),
        ("There is a cat on the mat.", "Is there a cat on the mat?"),
        ("It's under the table.", "Is it under the table?"),
        ("  The   cat is\nhere. ", "Is the cat here?"),
        # no verb that is known, or more than one sentence
        ("The cat chases the dog.", "Is it true that the cat chases the dog?"),
        ("The cat is black. The dog is white.", "Is it true that the cat is black. The dog is white?"),
        ("Is the cat black?", "Is the cat black?"),
        # marks that annotators leave
        ("The cow is ahead of the person ?", "Is the cow ahead of the person?"),
        ("The cat is on the mat;", "Is the cat on the mat?"),
        ('"The cat is on the mat."', "Is the cat on the mat?"),
        # moving a verb would make another sentence of these, or none
        (
            "The dog the man is holding is left of the car.",
            "Is it true that the dog the man is holding is left of the car?",
        ),
        ("The bear sits on a chair and is red.", "Is it true that the bear sits on a chair and is red?"),
        ("The cat is in and the dog is not.", "Is it true that the cat is in and the dog is not?"),
        ("The room has painted walls.", "Is it true that the room has painted walls?"),
        ("The cat ain't here.", "Is it true that the cat ain't here?"),
        # yes to "Is there no cat?" may mean either
        ("There is no cat on the mat.", "Is it true that there is no cat on the mat?"),
        ("The cat is never on the mat.", "Is it true that the cat is never on the mat?"),
        ("Nobody is on the horse.", "Is it true that nobody is on the horse?"),
        # what is denied is not the whole of it
        ("The cat is not on the mat but under it.", "Is it true that the cat is not on the mat but under it?"),
        ("The dog must not be near the cat.", "Is it true that the dog must not be near the cat?"),
    ],
)
def test_statements_become_questions_with_the_same_answer(statement, question):
    assert yes_no_question(statement) == (question, False)


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("The cat is not under the table.", "Is the cat under the table?"),
        ("The dogs aren't near the cat.", "Are the dogs near the cat?"),
        ("The cat is n't near the dog.", "Is the cat near the dog?"),
        ("The dogs aren\N{RIGHT SINGLE QUOTATION MARK}t near the cat.", "Are the dogs near the cat?"),
        ("The truck does not contain the dog.", "Does the truck contain the dog?"),
        ("The dog cannot see the cat.", "Can the dog see the cat?"),
        ("The cat won't move.", "Will the cat move?"),
    ],
)
def test_negatives_lose_their_not_and_turn_the_answer_round(statement, question):
    assert yes_no_question(statement) == (question, True)


def test_not_only_denies_nothing():
    assert yes_no_question("The cat is not only black.") == ("Is the cat not only black?", False)


RELATIONS = """
adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, at the back of,
ahead of, against, at the edge of, off, past, toward, down, away from, along, around, into, across, across from,
down from, facing, facing away from, parallel to, perpendicular to, on top of, beneath, beside, behind, left of,
right of, under, in front of, below, above, over, in the middle of, by, close to, near, far from, far away from,
connected to, detached from, part of, within, at, on, in, with, surrounding, among, out of, between, inside, outside,
touching, beyond, next to, opposite to, enclosed by
"""


@pytest.mark.parametrize("thing", ["person", "dining table", "tennis racket", "scissors", "teddy bear", "bus"])
def test_every_relation_of_the_data_set_is_asked_for(thing):
    for relation in (relation.strip() for relation in RELATIONS.split(",")):
        assert relation
        statement = f"The {thing} is {relation} the wine glass."
        assert yes_no_question(statement) == (f"Is the {thing} {relation} the wine glass?", False)
