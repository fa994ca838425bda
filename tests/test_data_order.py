import numpy as np
import pytest

from mmscale.data.order import MixtureOrder, StreamOrder, label_table
from mmscale.errors import UserError


def read(order, positions):
    return [order.locate(position) for position in positions]


@pytest.mark.parametrize("counts", [[1], [3], [7, 0, 1, 12], [100, 90, 110], [1] * 40])
@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (4, 3), (64, 1024)])
def test_every_epoch_holds_every_sample_once(counts, lanes, block):
    order = StreamOrder(counts, seed=5, lanes=lanes, block=block)
    size, everything = sum(counts), {(s, i) for s, count in enumerate(counts) for i in range(count)}
    for epoch in range(3):
        places = read(order, range(epoch * size, (epoch + 1) * size))
        assert {place.epoch for place in places} == {epoch}
        assert {(place.shard, place.sample) for place in places} == everything
        assert len(places) == len(everything)


def test_epochs_and_seeds_differ_and_neighbours_are_apart():
    def first(order, epoch):
        return [place[1:] for place in read(order, range(epoch * 4000, epoch * 4000 + 500))]

    order = StreamOrder([100] * 40, seed=1, lanes=8, block=64)
    again = StreamOrder([100] * 40, seed=1, lanes=8, block=64)
    assert first(order, 0) == first(again, 0)
    assert first(order, 0) != first(order, 1)
    assert first(order, 0) != first(StreamOrder([100] * 40, seed=2, lanes=8, block=64), 0)
    assert len({shard for shard, _ in first(order, 0)[:64]}) >= 8


def test_a_position_is_found_alone_as_in_a_row():
    order = StreamOrder([37, 41, 5], seed=9, lanes=4, block=8)
    in_a_row = read(order, range(500))
    for position in np.random.default_rng(0).permutation(500)[:100]:
        alone = StreamOrder([37, 41, 5], seed=9, lanes=4, block=8)
        assert alone.locate(int(position)) == in_a_row[position]


def test_the_order_of_version_1_stays_as_it_is():
    order = StreamOrder([10, 20, 30], seed=7, lanes=4, block=8)
    assert order.order_version == 1
    places = [(place.shard, place.sample) for place in read(order, range(8))]
    assert places == [(1, 3), (2, 0), (2, 15), (0, 0), (1, 1), (1, 19), (2, 14), (0, 1)]
    later = [(place.shard, place.sample) for place in read(order, range(40, 46))]
    assert later == [(1, 12), (2, 6), (2, 22), (0, 7), (1, 9), (2, 8)]


@pytest.mark.parametrize(("block", "lanes"), [(1000, 64), (1000, 48), (1000, 7), (12, 8), (10, 16), (6, 1), (9, 27)])
def test_labels_are_exact_in_every_block_and_every_lane(block, lanes):
    table = label_table(block, lanes)
    labels = np.arange(block)
    for number in range(lanes):
        assert np.array_equal(np.sort(table[number * block : (number + 1) * block]), labels)
    for lane in range(lanes):
        assert np.array_equal(np.sort(table[lane::lanes]), labels)


def test_sources_have_exact_shares_and_epochs_of_their_own():
    sources = [[300, 200], [70]]
    order = MixtureOrder(sources, [3.0, 1.0], seed=3, lanes=16, block=32)
    places = read(order, range(20_000))
    is_second = np.array([place.shard == 2 for place in places])
    assert (is_second.reshape(-1, 1000).sum(1) == 250).all()
    second = [place for place in places if place.shard == 2]
    # 5,000 readings of 70 samples: a lane of 4 or 5 samples begins an epoch of its own when it is through.
    for epoch in range(60):
        assert sorted(place.sample for place in second if place.epoch == epoch) == list(range(70))
    first = [(place.shard, place.sample) for place in places if place.shard < 2 and place.epoch == 0]
    assert len(set(first)) == len(first) == 500


def test_a_lane_of_the_mixture_reads_that_lane_of_each_source():
    order = MixtureOrder([[400], [400]], [1.0, 1.0], seed=3, lanes=8, block=16)
    for lane in range(8):
        for number in (0, 1):
            lane_samples = {order.orders[number].locate_in_lane(lane, turn).sample for turn in range(50)}
            read_samples = {
                place.sample
                for position in range(lane, 1600, 8)
                if (place := order.locate(position)).shard == number and place.epoch == 0
            }
            assert read_samples <= lane_samples


def test_a_mixture_refuses_what_it_cannot_keep():
    with pytest.raises(UserError, match=r"fewer than data\.lanes"):
        MixtureOrder([[400], [3]], [1.0, 1.0], seed=3, lanes=8)
    with pytest.raises(UserError, match="less than 1/1000"):
        MixtureOrder([[400], [400]], [1.0, 1e-5], seed=3, lanes=8)


def test_no_samples_are_refused():
    with pytest.raises(UserError, match="no samples"):
        StreamOrder([0, 0], seed=0)
