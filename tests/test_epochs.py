from lightning_msnn.epochs import value_at


def test_a_value_holds_from_its_epoch_until_the_next():
    values = {5: "b", 2: "a"}
    assert [value_at(values, epoch, "none") for epoch in (0, 1, 2, 4, 5, 99)] == ["none", "none", "a", "a", "b", "b"]
    assert value_at({}, 3, 7) == 7
