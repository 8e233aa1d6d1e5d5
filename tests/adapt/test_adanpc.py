from __future__ import annotations

import numpy as np
import pytest
import torch

from diptych.adapt import adanpc
from diptych.adapt.adanpc import Config, Memory, RingBuffer, annealed_tau, confidence, entropy, knn_loss, vote
from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

CLASSES, WIDTH = 3, 6


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def scene(rows=30, seed=0, noise=0.4, shift=0.0):
    centre = np.random.default_rng(0).standard_normal((CLASSES, WIDTH))
    drift = np.random.default_rng(9).standard_normal(WIDTH)
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % CLASSES
    return Examples(unit(centre[label] + shift * drift + noise * rng.standard_normal((rows, WIDTH))), label)


def support(**changes):
    return Support(unit(np.eye(CLASSES, WIDTH)), 100.0, scene(), **changes)


def test_vote_is_a_softmax_over_the_neighbours():
    memory = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64)
    similarity = (x / x.norm())[0].numpy()
    weight = np.exp(similarity[:2] / 0.1)
    expected = np.array([weight[0], 0, weight[1]]) / weight.sum() + 1e-5
    np.testing.assert_allclose(vote(x, memory, torch.tensor([0, 2, 2]), 3, 2, 0.1)[0], np.minimum(expected, 1), rtol=1e-12)
    assert vote(x, memory, torch.tensor([0, 2, 2]), 3, 1, 0.1)[0].tolist() == [1.0, 1e-5, 1e-5]


def test_k_larger_than_the_memory_takes_all_of_it():
    x, memory, label = torch.randn(4, WIDTH), torch.nn.functional.normalize(torch.randn(5, WIDTH)), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(vote(x, memory, label, 3, 5, 0.1), vote(x, memory, label, 3, 500, 0.1))


def test_ball_holds_only_if_every_row_of_the_batch_is_inside():
    angle = np.deg2rad([0, 10, 20, 80])
    memory, label = torch.tensor(np.c_[np.cos(angle), np.sin(angle)]), torch.tensor([0, 0, 1, 1])
    near, far = torch.tensor([[1.0, 0.05]], dtype=torch.float64), torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    alone = vote(near, memory, label, 2, 1, 0.1, epsilon=0.9)
    assert 0.1 < alone[0, 1] < 0.5  # three rows vote, one of them for class 1
    together = vote(torch.cat([near, far]), memory, label, 2, 1, 0.1, epsilon=0.9)
    assert together[0].tolist() == [1.0, 1e-5]


def test_vote_does_not_depend_on_blocks(monkeypatch):
    x, memory, label = torch.randn(20, WIDTH), torch.nn.functional.normalize(torch.randn(15, WIDTH)), torch.arange(15) % 3
    whole, ball = vote(x, memory, label, 3, 4, 0.1), vote(x, memory, label, 3, 4, 0.1, epsilon=0.01)
    monkeypatch.setattr("diptych.adapt.knn.BLOCK_CELLS", 40)
    torch.testing.assert_close(vote(x, memory, label, 3, 4, 0.1), whole)
    torch.testing.assert_close(vote(x, memory, label, 3, 4, 0.1, epsilon=0.01), ball)


def test_a_batch_is_scored_before_it_is_learnt():
    adapter = Config(k=1, beta=0).build().fit(support())
    batch = scene(6, seed=1)
    before = adapter.predict(batch)
    assert np.array_equal(adapter.predict(batch), before)  # predicting leaves no trace
    assert adapter.update(batch) is adapter
    assert len(adapter.memory) == 36
    assert adapter.memory.label_M[30:].tolist() == before.argmax(1).tolist()
    np.testing.assert_allclose(adapter.predict(batch).max(1), 1)  # now every row meets itself
    adapter.reset()
    assert np.array_equal(adapter.predict(batch), before)


def test_update_follows_a_drifting_stream_and_a_beta_above_one_does_not():
    stream = [scene(15, seed=10 + step, shift=step * 0.12) for step in range(14)]

    def right(beta):
        adapter, hits = Config(k=10, beta=beta).build().fit(support()), []
        for batch in stream:
            hits.append(adapter.predict(batch).argmax(1) == batch.label_N)
            adapter.update(batch)
        return np.concatenate(hits)

    frozen = Config(k=10).build().fit(support())
    still = np.concatenate([frozen.predict(batch).argmax(1) == batch.label_N for batch in stream])
    assert np.array_equal(right(1.1), still)
    assert right(0.0).mean() > still.mean() + 0.01


def test_update_never_looks_at_labels():
    fitted = [Config(beta=0).build().fit(support()) for _ in range(2)]
    batch = scene(9, seed=4)
    fitted[0].update(batch)
    fitted[1].update(Examples(batch.feature_ND))
    assert torch.equal(fitted[0].memory.label_M, fitted[1].memory.label_M)


def test_confidence_as_published_is_lower_than_the_score():
    score = torch.tensor([[1.0, 1e-5, 1e-5, 1e-5]])
    sure, label = confidence(score, "softmax_of_scores")
    assert sure.item() == pytest.approx(np.e / (np.e + 3), rel=1e-4)
    assert confidence(score, "score") == (torch.tensor([1.0]), torch.tensor([0]))
    assert label.item() == 0
    adapter = Config(k=1, beta=0.7, confidence="score").build().fit(support())
    assert len(adapter.update(scene(6, seed=1)).memory) == 36
    adapter = Config(k=1, beta=0.7).build().fit(support())
    assert len(adapter.update(scene(6, seed=1)).memory) == 30  # e / (e + 2) is 0.58


def test_a_full_class_loses_its_oldest_stream_row_and_no_source_row():
    memory = Memory(torch.eye(2), torch.tensor([0, 1]), capacity=2)
    rows = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [2.0, 1.0], [1.0, 4.0], [1.0, 5.0]])
    memory.append(rows[:1], torch.tensor([0]))
    memory.append(rows[1:], torch.tensor([0, 0, 1, 0, 0]))
    assert torch.equal(memory.feature_MD[:2], torch.eye(2))
    kept = {(round(float(y / x), 3), int(label)) for (x, y), label in zip(memory.feature_MD[2:], memory.label_M[2:], strict=True)}
    assert kept == {(4.0, 0), (5.0, 0), (0.5, 1)}
    memory.reset()
    memory.append(rows[:3], torch.zeros(3, dtype=torch.int64))
    assert len(memory) == 4


def test_memory_grows_by_doubling_and_keeps_the_order():
    memory = Memory(torch.eye(2), torch.tensor([0, 1]))
    for row in range(1, 60):
        memory.append(torch.tensor([[1.0, float(row)]]), torch.tensor([row]))
    assert memory.label_M.tolist() == [0, 1, *range(1, 60)]
    torch.testing.assert_close(memory.feature_MD[2:, 1] / memory.feature_MD[2:, 0], torch.arange(1.0, 60))
    assert len(memory._feature) <= 2 * len(memory)


def test_leftover_row_is_an_option_and_named_by_the_seed():
    adapter = Config(leftover_row=True).build().fit(support(seed=3))
    assert len(adapter.memory) == 31
    assert adapter.memory.label_M[0] == 0
    assert torch.equal(adapter.memory.feature_MD[:1], adanpc.leftover_row(WIDTH, 3))
    assert not torch.equal(adanpc.leftover_row(WIDTH, 3), adanpc.leftover_row(WIDTH, 4))
    adapter.reset()
    assert len(adapter.memory) == 31


def test_batch_norm_lowers_the_entropy_of_its_scores():
    adapter = Config(batch_norm=True, bn_lr=0.05, k=10, beta=1.1, tau=0.5).build().fit(support())
    batch = scene(12, seed=2)
    before = adapter.predict(batch)
    for _ in range(10):
        adapter.update(batch)
    assert entropy(torch.tensor(adapter.predict(batch))) < entropy(torch.tensor(before)) - 1e-4
    adapter.reset()
    np.testing.assert_array_equal(adapter.predict(batch), before)


def test_batch_norm_remembers_the_batch_at_every_step():
    adapter = Config(batch_norm=True, bn_steps=3, beta=0).build().fit(support())
    adapter.update(scene(4, seed=2))
    assert len(adapter.memory) == 30 + 3 * 4
    torch.testing.assert_close(adapter.memory.feature_MD.norm(dim=1), torch.ones(42))


def test_ring_wraps_around_and_keeps_the_last_of_a_large_batch():
    ring = RingBuffer.random(4, WIDTH, 0)
    assert ring.feature_QD.abs().max() <= (3 / WIDTH) ** 0.5
    ring.write(torch.eye(3, WIDTH) * 5, torch.tensor([1, 2, 3]))
    ring.write(torch.eye(2, WIDTH), torch.tensor([4, 5]))
    assert (ring.label_Q.tolist(), ring.index) == ([5, 2, 3, 4], 1)
    torch.testing.assert_close(ring.feature_QD.norm(dim=1), torch.ones(4))
    ring.write(torch.randn(9, WIDTH), torch.arange(9))
    assert sorted(ring.label_Q.tolist()) == [5, 6, 7, 8]
    assert (ring.index, int(ring.label_Q[ring.index - 1])) == (2, 8)


def test_training_on_the_knn_loss_separates_the_classes():
    torch.manual_seed(0)
    data = scene(60, noise=1.0)
    x, y = torch.from_numpy(data.feature_ND), torch.from_numpy(data.label_N)
    encoder, ring = torch.nn.Linear(WIDTH, WIDTH), RingBuffer.random(60, WIDTH, 0)
    adam, losses = torch.optim.Adam(encoder.parameters(), lr=0.02), []
    for step in range(60):
        feature = encoder(x)
        loss = knn_loss(vote(feature, ring.feature_QD, ring.label_Q, CLASSES, 20, annealed_tau(step, steps=60)), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        ring.write(feature, y)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[1]


def test_tau_anneals_and_stays():
    assert [annealed_tau(step) for step in (0, 2500, 5000, 9000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_an_adapter_without_memory_or_with_other_features_is_refused():
    with pytest.raises(DataError, match="labelled"):
        Config().build().fit(Support(unit(np.eye(3, WIDTH)), 100.0))
    with pytest.raises(DataError, match="do not match"):
        Config().build().fit(support()).predict(Examples(np.zeros((1, 2), np.float32)))
