"""Which images come when: every one once a pass, by (seed, step) alone, and cut up among processes without loss."""

from itertools import chain

import pytest

from twicing.training.order import BatchOrder, Consecutive, batch_order, mirrored_slice, training_steps
from twicing.training.recipe import digits, imagenet_deit_tiny
from twicing.training.settings import apply_settings
from twicing.training.streams import stream_seed


def batches(order, epoch=0):
    order.set_epoch(epoch)
    return [part.images for part in order]


def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch():
    order = BatchOrder(50, 16, seed=0)
    passes = []
    for epoch in range(2):
        found = batches(order, epoch)
        assert [len(batch) for batch in found] == [16, 16, 16, 2]
        assert len(found) == len(order)
        passes.append(list(chain.from_iterable(found)))
        assert sorted(passes[-1]) == list(range(50))
    other = list(chain.from_iterable(batches(BatchOrder(50, 16, seed=1))))
    assert passes[0] != passes[1]
    assert passes[0] != other
    assert batches(BatchOrder(50, 16, seed=0), 1) == batches(order, 1), "the order depends on what was read before"


def test_a_longer_training_goes_on_into_the_next_pass():
    """At length 1.5 two epochs are three passes, and begin with the batches that length 1 has."""
    plain, longer = BatchOrder(40, 10, seed=0), BatchOrder(40, 10, seed=0, length=1.5)
    assert (len(plain), len(longer)) == (4, 6)
    by_step = [*batches(longer, 0), *batches(longer, 1)]
    assert by_step == [*batches(plain, 0), *batches(plain, 1), *batches(plain, 2)]
    longer.set_epoch(1)
    assert [part.pass_number for part in longer] == [1, 1, 2, 2, 2, 2], "augmentation would come again"
    assert len(BatchOrder(40, 10, seed=0, length=1e-9)) == 1


def test_repeats_come_one_after_the_other_and_an_epoch_stays_as_long():
    """arXiv 1902.05509 as timm's sampler has it: the shuffled images, each three times, cut off at n."""
    order = BatchOrder(10, 4, seed=0, repeats=3)
    parts = list(order)
    images = list(chain.from_iterable(part.images for part in parts))
    repeats = list(chain.from_iterable(part.repeats for part in parts))
    assert len(images) == 10
    assert [len(set(images[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(images)) == 4
    assert repeats == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert set(chain.from_iterable(batches(order, 1))) != set(images)


def test_repeats_are_those_of_timms_sampler():
    from timm.data.distributed_sampler import RepeatAugSampler

    theirs = list(RepeatAugSampler(range(512), num_replicas=1, rank=0, shuffle=False, num_repeats=3))
    order = BatchOrder(512, 512, seed=0, repeats=3)
    (ours,) = batches(order)
    # The same pattern of repeats: the k-th image of the shuffled list where timm's has the k-th.
    shuffled = list(dict.fromkeys(ours))
    assert [shuffled.index(image) for image in ours] == theirs


def test_whole_batches_leave_the_rest_of_a_pass_out():
    assert [len(batch) for batch in batches(BatchOrder(50, 16, seed=0, whole_batches=True))] == [16, 16, 16]
    with pytest.raises(ValueError, match=r"mixing needs whole batches, .* must not exceed .*: got 16 and 15"):
        BatchOrder(15, 16, seed=0, whole_batches=True)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 17])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_are_mirrored_and_together_the_batch(n, world):
    slices = [mirrored_slice(n, rank, world) for rank in range(world)]
    counted = [places for places, share in slices if share]
    assert sorted(chain.from_iterable(counted)) == list(range(n))
    # The mean over processes of share * local mean is the mean over all.
    values = [1.7**i for i in range(n)]
    means = [share * sum(values[i] for i in places) / len(places) for places, share in slices]
    assert sum(means) / world == pytest.approx(sum(values) / n)
    for places in counted:
        # What mixup does in a slice, mixing its i-th with its i-th last, is what it does in the whole batch.
        assert [n - 1 - i for i in places] == places[::-1]
    if world == 1:
        assert slices == [(list(range(n)), 1.0)]


@pytest.mark.parametrize(
    "make", [lambda **who: BatchOrder(50, 16, seed=2, repeats=3, **who), lambda **who: Consecutive(50, 16, **who)]
)
def test_processes_share_the_batches_of_one(make):
    alone, both = list(make()), [list(make(rank=rank, world=2)) for rank in range(2)]
    assert len(alone) == len(both[0]) == len(both[1])
    for whole, *parts in zip(alone, *both, strict=True):
        wanted = sorted(zip(whole.images, whole.repeats, strict=True))
        # With a last batch of two, one of the processes has none that counts.
        counted = [zip(p.images, p.repeats, strict=True) for p in parts if p.share]
        assert wanted == sorted(chain.from_iterable(counted))
        assert {part.pass_number for part in parts} == {whole.pass_number}


def test_held_out_images_come_once_and_in_order():
    assert list(chain.from_iterable(part.images for part in Consecutive(50, 16))) == list(range(50))
    assert len(Consecutive(50, 16)) == 4


def test_a_recipe_says_how_its_batches_come():
    deit = apply_settings(imagenet_deit_tiny(), ["batch_size=8", "training_length=2"])
    order = batch_order(deit, 36, seed=5, rank=1, world=2)
    assert (order.repeats, order.batches_in_a_pass, order.steps, order.seed) == (3, 4, 8, 5)
    assert (order.rank, order.world) == (1, 2)
    # 300 epochs and 10 of cool-down.
    assert training_steps(deit, 36) == 310 * 8
    assert training_steps(digits(), 1500) == 12 * 94


def test_streams_do_not_collide():
    seeds = {stream_seed(seed, stream, count) for seed in range(8) for stream in range(1, 8) for count in range(50)}
    assert len(seeds) == 8 * 7 * 50
    # The first of several processes draws what one alone draws; that is what keeps old checkpoints good.
    assert stream_seed(1, 2, 3, 0) == stream_seed(1, 2, 3) != stream_seed(1, 2, 3, 1)
