from aki.data.memory import Batches

DATA = ["a", "b", "c", "d"]


def made_and_counted(memory, name=""):
    made = []

    def collate(samples):
        made.append("".join(samples))
        return [sample.upper() for sample in samples]

    return Batches(DATA, collate, name, memory), made


def test_a_batch_is_made_once_for_each_name_and_order_of_indices():
    memory = {}
    first, made = made_and_counted(memory)
    assert first([2, 0]) == first([2, 0]) == ["C", "A"]
    assert first([0, 2]) == ["A", "C"]
    again, nothing = made_and_counted(memory)
    assert again(range(2, 3)) == ["C"]
    assert again([2, 0]) == ["C", "A"]
    assert (made, nothing) == (["ca", "ac"], ["c"])
    other, anew = made_and_counted(memory, "other")
    assert other([2, 0]) == ["C", "A"]
    assert anew == ["ca"]


def test_without_a_memory_each_is_made_anew():
    batches, made = made_and_counted(None)
    assert batches([1]) == batches([1]) == ["B"]
    assert made == ["b", "b"]
