"""Dense or sparse: the choice follows what was measured, a fixed number of updates later, whoever looks when."""

import pytest
import torch

from scope_lens.training.dispatch import BREAK_EVEN, Dispatcher
from scope_lens.training.kernels.choice import resolve


def dispatcher(d_sae=65_536, **settings):
    return Dispatcher(d_sae, lag=2, **settings)


def measured(choices, means, *, most=3.0):
    """Feed one measurement an update, and give the choice for each."""
    found = []
    for step, mean in enumerate(means):
        found.append(choices.choose(step))
        choices.observe(step, most=int(most * mean), mean=mean, halted=False)
    return found


def test_training_starts_dense_and_moves_over_by_itself():
    found = measured(dispatcher(), [30_000, 2_000, 300, 120, 90, 80, 80, 80])
    assert [choice.sparse for choice in found] == [False] * 5 + [True] * 3
    assert found[-1].capacity == 512  # 1.25 * 270, to the next power of two
    assert found[5].capacity == 512  # 1.25 * 360


@pytest.mark.parametrize(("d_sae", "mean", "sparse"), [(16_384, 70, False), (16_384, 50, True), (65_536, 230, True)])
def test_the_width_decides_where_sparse_pays(d_sae, mean, sparse):
    choices = dispatcher(d_sae)
    measured(choices, [mean] * 3, most=1.5)
    assert choices.choose(9).sparse is sparse
    assert (mean < BREAK_EVEN * d_sae) is sparse


def test_it_does_not_change_to_and_fro_at_the_break_even():
    limit = BREAK_EVEN * 65_536
    found = measured(dispatcher(), [limit - 1, limit + 1] * 8)
    assert [choice.sparse for choice in found[3:]] == [True] * 13
    found = measured(dispatcher(), [limit - 1] * 3 + [1.3 * limit] * 4)
    assert [choice.sparse for choice in found] == [False, False, True, True, True, False, False]


def test_a_row_wider_than_any_capacity_keeps_the_run_dense():
    found = measured(dispatcher(), [100.0] * 4, most=11)
    assert not any(choice.sparse for choice in found)


def test_after_a_halt_everything_that_may_have_been_launched_is_dense():
    choices = dispatcher()
    measured(choices, [80] * 6)
    choices.observe(6, most=900, mean=90, halted=True)
    assert [choices.choose(step).sparse for step in (6, 7, 8, 9)] == [False, False, False, True]
    assert choices.choose(9).capacity == 1_024


def test_looking_earlier_changes_no_choice():
    means = [3_000, 100, 90, 500, 80, 70, 100, 100, 90]
    late, early = dispatcher(), dispatcher()
    expected = measured(late, means)
    found = []
    for step, mean in enumerate(means):
        found.append(early.choose(step))
        early.observe(step, most=3 * mean, mean=mean, halted=False)
        if step % 3 == 1:  # broken off here, and taken up again
            again = dispatcher()
            again.load_state(early.state())
            early = again
    assert found == expected


def test_without_cuda_the_kernels_are_refused_with_the_remedy():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu) == resolve("eager", cpu) == "eager"
    with pytest.raises(ValueError, match=r"kernels='triton' cannot run here: the dictionaries are on 'cpu' .* NVIDIA"):
        resolve("triton", cpu)
    with pytest.raises(ValueError, match="kernels='fast' is unknown; expected 'auto', 'eager', 'triton'"):
        resolve("fast", cpu)
