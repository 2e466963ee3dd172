"""What labelled pairs add to the head's loss, against a literal transcription of the whole loss of an update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import embeddings_of, rewards_of

from learners.head_learner import HeadLearner
from r2m_async import R2MConfig
from r2m_async.head_objectives import group_reward_entropy, pair_weights
from r2m_async.labels.pairs import pair_of
from r2m_async.models.heads import Ensemble, bootstrap_weight, head_losses, label_losses
from r2m_async.trajectories import HeadGroup, Label, LabelBatch, LabelledPair

SIZE = 4


def config_with(head=None, **labels):
    config = R2MConfig().head(**{"variant": "iterative_head"} | (head or {}))
    return config.labels(**{"source": "any:function"} | labels)


def head_with(weight=(0.5, 1.0)):
    head = torch.nn.Module()
    head.scoring_head = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        head.scoring_head.weight.copy_(torch.tensor([weight]))
    return head


def groups_of(group_ids):
    return [
        HeadGroup(embeddings=one, feedback=None, annotated=rewards)
        for one, rewards in zip(embeddings_of(group_ids, SIZE), rewards_of(group_ids, SIZE), strict=True)
    ]


def labelled(group_id, chosen, rejected):
    (group,) = groups_of([group_id])
    label = Label(group_id=group_id, step=0, pair=(chosen, rejected), chosen=chosen)
    return LabelledPair(label=label, group=pair_of(group, (chosen, rejected)))


def literal(head, group_ids, asked, pairs, alpha, self_weight):
    """(1 - alpha) x the weighted mean of -log sigmoid(r_w - r_l), plus alpha x the mean entropy, in loops."""
    terms, weights, entropies = [], [], []
    for group_id in group_ids:
        rewards = [head.scoring_head(row)[0] for row in embeddings_of([group_id], SIZE)[0].rte]
        entropies.append(group_reward_entropy(torch.stack(rewards)[None]))
        if group_id not in asked:
            best, worst = (pick(rewards, key=lambda one: one.item()) for pick in (max, min))
            terms.append(-torch.log(torch.sigmoid(best - worst)))
            weights.append(self_weight)
    for group_id, chosen, rejected in pairs:
        rte = embeddings_of([group_id], SIZE)[0].rte
        gap = head.scoring_head(rte[chosen])[0] - head.scoring_head(rte[rejected])[0]
        terms.append(-torch.log(torch.sigmoid(gap)))
        weights.append(1.0)
    total = sum(weights)
    preference = sum(w * term for w, term in zip(weights, terms, strict=True)) / total if total else 0.0
    return (1 - alpha) * preference + alpha * (sum(entropies) / len(entropies) if entropies else 0.0)


def gradient_of(head, loss):
    head.zero_grad()
    loss.backward()
    return head.scoring_head.weight.grad.clone()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.sets(st.integers(0, 3)),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), st.integers(2, 3)), max_size=5),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
)
def test_the_terms_of_groups_and_pairs_add_up_to_the_loss_of_the_update_with_its_gradient(
    num_groups, asked, pairs, alpha, self_weight
):
    group_ids = list(range(num_groups))
    config, head, groups = config_with({"alpha": alpha}, self_weight=self_weight), head_with(), groups_of(group_ids)
    new = tuple(labelled(*pair) for pair in pairs)
    labels = LabelBatch(step=0, asked=tuple(sorted(asked)), new=new[:2], replayed=new[2:])
    whole = sum(term.loss for part in head_losses(head, groups, 0, config, labels) for term in part) / max(
        num_groups, 1
    )
    whole = whole + sum(pair.loss for pair in label_losses(head, groups, 0, config, labels))
    expected = literal(head, group_ids, asked, pairs, alpha, self_weight)
    values = [torch.as_tensor(one).detach().item() for one in (whole, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    if isinstance(expected, torch.Tensor) and expected.requires_grad:
        gradients = (gradient_of(head, loss) for loss in (whole, expected))
        assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_weights_of_pairs_by_hand():
    assert pair_weights(0, 8, 1.0) == (1 / 8, 1 / 8), "the paper's mean over groups"
    assert pair_weights(3, 2, 0.5) == (1 / 4, 1 / 8)
    assert pair_weights(3, 2, 0.0) == (1 / 3, 0.0)
    assert pair_weights(0, 2, 0.0) == pair_weights(0, 0, 1.0) == (0.0, 0.0)


def test_a_pair_agrees_if_the_head_ranks_it_so_before_the_update():
    head = head_with((1.0, 0.0))
    rte = embeddings_of([0], SIZE)[0].rte[:, 0]
    best, worst = int(rte.argmax()), int(rte.argmin())
    pairs = (labelled(0, best, worst), labelled(0, worst, best))
    labels = LabelBatch(step=0, asked=(), new=pairs, replayed=())
    assert [bool(one.agrees) for one in label_losses(head, [], 0, config_with(), labels)] == [True, False]


def updated(learner, step, group_ids, labels, refreshed=None):
    groups = groups_of(group_ids)
    report, _ = learner.update(
        step, [one.embeddings for one in groups], refreshed, [one.annotated for one in groups], labels
    )
    return report.metrics


def test_the_learner_reports_of_new_labels_alone_and_takes_no_step_by_momentum_without_any():
    head = head_with((1.0, 0.0))
    learner = HeadLearner(head, config_with({"alpha": 0.0, "lr": 0.1}, self_weight=0.0))
    rte = embeddings_of([0], SIZE)[0].rte[:, 0]
    best, worst = int(rte.argmax()), int(rte.argmin())
    first = LabelBatch(step=0, asked=(0, 1), new=(labelled(0, worst, best),), replayed=(labelled(0, best, worst),))
    metrics = updated(learner, 0, [0, 1], first)
    assert metrics["labels/accuracy"] == 0.0 and metrics["labels/bradley_terry"] > 0.69
    moved = head.scoring_head.weight.detach().clone()
    assert not torch.equal(moved, torch.tensor([[1.0, 0.0]]))
    metrics = updated(learner, 1, [2, 3], LabelBatch(step=1, asked=(2, 3), new=(), replayed=()))
    assert torch.equal(head.scoring_head.weight, moved) and "labels/accuracy" not in metrics


def test_labels_teach_in_a_step_that_the_policy_left_out():
    head = head_with()
    learner = HeadLearner(head, config_with({"lr": 0.1}))
    metrics = updated(learner, 0, [0, 1], LabelBatch(step=0, asked=(), new=(), replayed=()), refreshed=())
    assert metrics == {"head/skipped_updates": 1.0}
    before = head.scoring_head.weight.detach().clone()
    new = (labelled(7, 0, 1),)
    metrics = updated(learner, 1, [2], LabelBatch(step=1, asked=(), new=new, replayed=()), refreshed=())
    assert metrics["labels/bradley_terry"] > 0 and not torch.equal(head.scoring_head.weight, before)


def test_each_head_of_an_ensemble_learns_from_a_group_or_a_label_as_often_as_its_bootstrap_says():
    config = config_with({"alpha": 0.3, "ensemble": 3})
    members = [head_with((0.5, 1.0)), head_with((-0.5, 0.3)), head_with((0.5, 1.0))]
    groups, pair = groups_of([0, 1, 2, 3]), labelled(7, 0, 2)
    labels = LabelBatch(step=0, asked=(2,), new=(pair,), replayed=())
    whole = sum(term.loss for part in head_losses(Ensemble(members), groups, 0, config, labels) for term in part) / len(
        groups
    )
    (whole + next(iter(label_losses(Ensemble(members), groups, 0, config, labels))).loss).backward()
    gradients = [member.scoring_head.weight.grad.clone() for member in members]
    assert not torch.equal(gradients[0], gradients[2]), "heads that are alike learn apart"
    alone = config_with({"alpha": 0.3})
    for index, (member, gradient) in enumerate(zip(members, gradients, strict=True)):
        member.zero_grad()
        seen = [bootstrap_weight(group_id, index, config) for group_id in (0, 1, 2, 3, 7)]
        terms = [term.loss / len(groups) for part in head_losses(member, groups, 0, alone, labels) for term in part]
        terms += [one.loss for one in label_losses(member, groups, 0, alone, labels)]
        sum(times * term for times, term in zip(seen, terms, strict=True)).backward()
        assert torch.allclose(gradient, member.scoring_head.weight.grad, atol=1e-6)


def test_bootstrap_weights_are_poisson_with_mean_one_and_a_head_that_is_alone_sees_all_once():
    config = config_with({"ensemble": 2})
    weights = [bootstrap_weight(group_id, member, config) for group_id in range(2000) for member in range(2)]
    shares = [weights.count(number) / len(weights) for number in range(4)]
    assert shares == pytest.approx([0.368, 0.368, 0.184, 0.061], abs=0.025)
    assert {bootstrap_weight(group_id, 0, config_with()) for group_id in range(50)} == {1}


def test_a_head_of_an_ensemble_that_sees_nothing_of_a_step_is_not_moved_by_its_momentum():
    config = config_with({"alpha": 0.0, "lr": 0.1, "ensemble": 2}, self_weight=0.0)
    members = [head_with((0.5, 1.0)), head_with((-0.5, 0.3))]
    learner = HeadLearner(Ensemble(members), config)
    seen = {group_id: [bootstrap_weight(group_id, member, config) for member in range(2)] for group_id in range(100)}
    both = next(group_id for group_id, (one, other) in seen.items() if one and other)
    first_alone = next(group_id for group_id, (one, other) in seen.items() if one and not other)
    weights = []
    for step, group_id in enumerate((both, first_alone)):
        labels = LabelBatch(step=step, asked=(), new=(labelled(group_id, 0, 1),), replayed=())
        updated(learner, step, [], labels)
        weights.append([member.scoring_head.weight.detach().clone() for member in members])
    assert not torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])
