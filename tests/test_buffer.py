"""Reference: a queue (no generator) or a bag (generator) of tokens kept in a list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_multilayer.store.buffer import ShuffleBuffer

N_LAYERS, D_IN = 3, 2


def make_buffer(capacity, *, shuffles, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0) if shuffles else None
    cpu = torch.device("cpu")
    buffer = ShuffleBuffer(capacity, N_LAYERS, D_IN, dtype, cpu, generator)
    buffer.data.fill_(float("nan"))  # what was never written must never be served
    return buffer


def vectors(numbers):
    """Of a token: its number, and in the fraction the layer and the dimension."""
    place = torch.arange(N_LAYERS * D_IN, dtype=torch.float64).view(N_LAYERS, D_IN)
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) + place / 8


def fill(buffer, numbers):
    slots = buffer.free_slots(len(numbers))
    for layer in range(N_LAYERS):
        buffer.data[:, layer].index_copy_(0, slots, vectors(numbers)[:, layer])
    buffer.commit(len(numbers))


def numbers_of(drawn):
    """The tokens that were drawn; checks that each has all its layers, in order."""
    numbers = drawn[:, 0, 0].tolist()
    torch.testing.assert_close(drawn, vectors(numbers), rtol=0, atol=0)
    return [int(n) for n in numbers]


def test_serves_tokens_in_order_without_a_generator():
    buffer = make_buffer(6, shuffles=False)
    fill(buffer, [0, 1, 2, 3])
    first = numbers_of(buffer.draw(3))
    fill(buffer, [4, 5])
    fill(buffer, [6, 7, 8])
    buffer.shuffle()
    assert first + numbers_of(buffer.draw(6)) == list(range(9))


def test_shuffles_with_a_generator():
    buffer = make_buffer(100, shuffles=True)
    fill(buffer, list(range(100)))
    buffer.shuffle()
    drawn = numbers_of(buffer.draw(100))
    assert drawn not in (list(range(100)), list(range(99, -1, -1)))
    assert sorted(drawn) == list(range(100))


def test_shuffling_is_the_same_for_the_same_seed():
    def draws():
        buffer = make_buffer(50, shuffles=True)
        fill(buffer, list(range(50)))
        buffer.shuffle()
        return numbers_of(buffer.draw(50))

    assert draws() == draws()


def test_every_order_is_about_as_likely():
    generator = torch.Generator().manual_seed(0)
    buffer = ShuffleBuffer(3, 1, 1, torch.float32, torch.device("cpu"), generator)
    counts = {}
    for _ in range(1200):
        buffer.data[buffer.free_slots(3), 0, 0] = torch.arange(3.0)
        buffer.commit(3)
        buffer.shuffle()
        order = tuple(buffer.draw(3).flatten().tolist())
        counts[order] = counts.get(order, 0) + 1
    # 200 each is expected; 140 is 4.6 standard deviations away.
    assert len(counts) == 6
    assert min(counts.values()) > 140


def test_drawn_vectors_are_a_copy():
    buffer = make_buffer(2, shuffles=False)
    fill(buffer, [0, 1])
    drawn = buffer.draw(2)
    fill(buffer, [2, 3])
    assert numbers_of(drawn) == [0, 1]


def test_slots_given_out_do_not_change_afterwards():
    buffer = make_buffer(4, shuffles=False)
    slots = buffer.free_slots(3)
    before = slots.tolist()
    buffer.commit(3)
    assert slots.tolist() == before


def test_free_slots_that_are_not_committed_stay_free():
    buffer = make_buffer(4, shuffles=False)
    fill(buffer, [0, 1])
    buffer.free_slots(2)
    assert (buffer.n_filled, buffer.n_free) == (2, 2)
    assert numbers_of(buffer.draw(2)) == [0, 1]


@pytest.mark.parametrize("misuse", ["free_slots", "draw"])
@pytest.mark.parametrize("n_tokens", [3, -1])
def test_reading_more_than_the_buffer_holds_fails(misuse, n_tokens):
    buffer = make_buffer(4, shuffles=False)
    fill(buffer, [0, 1])
    with pytest.raises(AssertionError):
        getattr(buffer, misuse)(n_tokens)


def test_keeps_the_requested_dtype():
    buffer = make_buffer(4, shuffles=False, dtype=torch.bfloat16)
    buffer.commit(4)
    assert buffer.draw(4).dtype == torch.bfloat16
    assert buffer.data.nbytes == 4 * N_LAYERS * D_IN * 2


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["fill", "draw", "shuffle"]), st.floats(0, 1)),
    max_size=40,
)


@settings(deadline=None)
@given(OPERATIONS, st.integers(1, 12), st.booleans())
def test_serves_each_token_once_whatever_the_sequence(operations, capacity, shuffles):
    buffer = make_buffer(capacity, shuffles=shuffles)
    place, next_number, waiting = buffer.data.data_ptr(), 0, []
    for operation, share in [*operations, ("draw", 1.0)]:
        if operation == "fill":
            n = round(share * (capacity - len(waiting)))
            new = list(range(next_number, next_number + n))
            fill(buffer, new)
            waiting, next_number = waiting + new, next_number + n
        elif operation == "draw":
            n = round(share * len(waiting))
            drawn = numbers_of(buffer.draw(n))
            assert len(set(drawn)) == n
            assert set(drawn) <= set(waiting)
            if not shuffles:
                assert drawn == waiting[:n]
            waiting = [number for number in waiting if number not in drawn]
        else:
            buffer.shuffle()
        assert (buffer.n_filled, buffer.n_free) == (
            len(waiting),
            capacity - len(waiting),
        )
        assert buffer.data.data_ptr() == place
    assert not waiting
