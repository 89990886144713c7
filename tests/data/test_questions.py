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
        ("The cat has no tail.", "Does the cat have no tail?"),
        # the verb of the statement, not of a clause in it
        ("The man who is standing is left of the dog.", "Is the man who is standing left of the dog?"),
        ("The vase that the flower is in is near the wall.", "Is the vase that the flower is in near the wall?"),
        ("A cat that has stripes faces the dog.", "Does a cat that has stripes face the dog?"),
        ("The bench is where the man is.", "Is the bench where the man is?"),
        # words that are verbs elsewhere
        ("The can is on the table.", "Is the can on the table?"),
        ("The bed covers are on the floor.", "Are the bed covers on the floor?"),
        # names keep their capital
        ("London is in England.", "Is London in England?"),
        ("There is a cat on the mat.", "Is there a cat on the mat?"),
        ("It's under the table.", "Is it under the table?"),
        ("  The   cat is\nhere. ", "Is the cat here?"),
        # no verb that is known, or more than one sentence
        ("The cat chases the dog.", "Is it true that the cat chases the dog?"),
        ("The cat is black. The dog is white.", "Is it true that the cat is black. The dog is white?"),
        ("Is the cat black?", "Is the cat black?"),
    ],
)
def test_statements_become_questions_with_the_same_answer(statement, question):
    assert yes_no_question(statement) == (question, False)


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("The cat is not under the table.", "Is the cat under the table?"),
        ("The dogs aren't near the cat.", "Are the dogs near the cat?"),
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
