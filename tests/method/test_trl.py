"""Our losses against TRL's, which record_trl.py recorded on the same inputs. No TRL is needed.

Losses agree to 1e-5 in fp32, gradient norms to 1e-4 (relative). Where TRL differs from the paper,
we follow the paper. Then the test names the difference, checks that it is there, and checks that
nothing is left once it is removed.
"""
import json
from types import SimpleNamespace

import pytest
import record_trl
import torch
import transformers

import common  # noqa: F401  imported before the libraries that use torch, as in the scripts
import dpo
import grpo
import kto
import online_dpo
import ppo
import reward_model
import sft

TRL = json.loads(record_trl.FILE.read_text())


def equal(ours, theirs, *leaves):
    """Whether our loss and gradient norm equal TRL's."""
    ours = record_trl.loss_and_norm(ours, *leaves)
    return (ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5, rel=1e-6)
            and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4))


def scored(script, x, mask):
    """Log-probs of the tokens in the mask, by the script's own token_logps from hidden states."""
    head = torch.nn.Linear(8, 13, bias=False)
    head.weight = torch.nn.Parameter(x.head)
    model = SimpleNamespace(base_model=lambda **kwargs: (x.hidden,),
                            get_output_embeddings=lambda: head,
                            config=transformers.PreTrainedConfig())
    batch = {"input_ids": x.input_ids, "attention_mask": x.attention_mask, "loss_mask": mask}
    return script.token_logps(model, batch)


def test_sft():
    """The loss of a micro-batch, too, is divided by the trained tokens of the whole step."""
    x = record_trl.sequences(10)
    logps = scored(sft, x, x.loss_mask)
    for name, count in ("whole", 6), ("part", 2):
        loss = sft.sft_loss(logps[:count], x.loss_mask[:count], x.loss_mask.sum())
        assert equal(loss, TRL["sft"][name], x.hidden), name


@pytest.mark.parametrize("name", record_trl.REWARDS)
def test_reward_model(name):
    """With and without a margin, with and without centering."""
    margin, centering = record_trl.REWARDS[name]
    rewards, margins = record_trl.comparisons()
    loss = reward_model.reward_loss(*rewards.chunk(2), (margin or 0) * margins, centering)
    assert equal(loss.mean(), TRL["reward_model"][name], rewards)


@pytest.mark.parametrize("name", record_trl.PREFERENCES)
def test_preferences(name):
    """DPO (also smoothed), hinge and SimPO equal TRL's. The others differ in one thing each.

    IPO: TRL takes means over tokens, the paper sums. CPO: TRL's NLL of the chosen answers is a mean
    over all tokens of the batch, the paper's is a sum. ORPO: TRL's NLL includes the prompt.
    """
    loss, _, beta, extra = record_trl.PREFERENCES[name]
    x, theirs = record_trl.sequences(30), TRL["preferences"]
    logps, lengths = scored(dpo, x, x.loss_mask).sum(1), x.loss_mask.sum(1)
    ref_logps = x.ref_logps if loss in ("dpo", "hinge", "ipo") else torch.zeros(6)

    def loss_of(logps, ref_logps):
        four = [*logps.chunk(2), *ref_logps.chunk(2)]
        return dpo.preference_loss(*four, *lengths.chunk(2), loss, beta, **extra)[0].mean()

    ours = loss_of(logps, ref_logps)
    assert equal(ours, theirs[name], x.hidden) == (loss in ("dpo", "hinge", "simpo"))
    if loss == "ipo":
        ours = loss_of(logps / lengths, ref_logps / lengths)
    if loss in ("cpo", "orpo"):
        answers = logps[:3] / lengths[:3] if loss == "orpo" else logps[:3]
        trained = (x.loss_mask if loss == "cpo" else x.attention_mask).clone()
        trained[3:] = 0
        nll = -scored(dpo, x, trained).sum() / trained[:, 1:].sum()
        assert nll.item() == pytest.approx(theirs[name + "_nll"], abs=1e-5)
        ours = ours + answers.mean() + nll
    assert equal(ours, theirs[name], x.hidden)


@pytest.mark.parametrize("name", record_trl.KTO)
def test_kto(name):
    """With TRL's z, the losses agree. TRL has one z per micro-batch and process, we one per step.

    For z, TRL pairs each prompt with the completion of the row before it, whatever its prompt. If
    two consecutive rows share a prompt, it is thus paired with one of its own completions.
    """
    x, theirs = record_trl.sequences(80), TRL["kto"][name]
    log_ratios = scored(kto, x, x.loss_mask).sum(1) - x.ref_logps
    mismatched = x.mismatched_logps - x.mismatched_ref_logps
    z = mismatched.mean().clamp(min=0)
    assert z.item() == pytest.approx(theirs["z"], rel=1e-5) and z > 0

    def loss_of(rows, z):
        return kto.kto_loss(log_ratios[rows], x.labels[rows], z, *record_trl.KTO[name]).mean()

    whole, halves = loss_of(slice(6), z), (slice(3), slice(3, 6))
    assert equal(whole, theirs["whole"], x.hidden)
    assert not equal(whole, theirs["halves"], x.hidden)
    own = [loss_of(rows, mismatched[rows].mean().clamp(min=0)) for rows in halves]
    assert equal(sum(own) / 2, theirs["halves"], x.hidden)
    assert TRL["kto"]["order"] == [5, 0, 1, 2, 3, 4]  # the completion that follows each prompt


@pytest.mark.parametrize("drift", record_trl.DRIFTS)
@pytest.mark.parametrize("beta", record_trl.BETAS)
@pytest.mark.parametrize("loss", record_trl.GROUP_LOSSES)
def test_group_losses(loss, beta, drift):
    """Without a KL penalty, all losses equal TRL's at three distances from the sampling policy.

    With one, TRL multiplies k3 by the importance ratio, which DeepSeekMath's eq. 4 does not.
    """
    x = record_trl.completions(40, drift)
    theirs = TRL["group_losses"][f"{loss} beta {beta} drift {drift}"]
    assert TRL["group_losses"]["use_bias_correction_kl"] is True
    high = 1.28 if loss == "cispo" else 0.28
    losses, clipped = grpo.token_losses(
        x.logps, x.old_logps, x.advantages, x.mask, loss, 0.2, high)
    weights = grpo.token_weights(x.mask, loss, 6, x.mask.sum(), record_trl.LONGEST)
    kl = grpo.token_kl(x.logps, x.ref_logps)
    ours = ((losses + beta * kl) * weights).sum()
    assert equal(ours, theirs, x.logps) == (beta == 0)
    log_ratio = x.logps - x.old_logps
    if loss == "gspo":
        log_ratio = (log_ratio * x.mask).sum(1, keepdim=True) / x.mask.sum(1, keepdim=True)
    ours = ((losses + beta * kl * log_ratio.exp()) * weights).sum()
    assert equal(ours, theirs, x.logps)
    if drift != 0.05:
        assert (clipped * x.mask).any() == (drift == 0.5)  # one of the distances is past the clip


@pytest.mark.parametrize("name, options", [
    ("group", {}), ("unscaled", {"scale": False}), ("rloo", {"baseline": "rloo"})])
def test_advantages(name, options):
    """Group baseline, with and without division by the std, and leave-one-out baseline (rloo)."""
    ours = grpo.group_advantages(record_trl.grouped_rewards(), **options).flatten().tolist()
    assert ours == pytest.approx(TRL["advantages"][name], abs=1e-5)


@pytest.mark.parametrize("drift", record_trl.DRIFTS)
def test_rloo(drift):
    """TRL has one ratio per answer, the product of the token ratios. We have a ratio per token.

    If each answer is treated as one token, the losses agree at any ratio. Token by token, the
    gradients agree only at ratio 1 (here, the constant by which dr_grpo divides is 1).
    """
    x, theirs = record_trl.completions(60, drift), TRL["rloo"][f"drift {drift}"]

    def loss_of(logps, old_logps, mask):
        losses, _ = grpo.token_losses(logps, old_logps, x.advantages, mask, "dr_grpo", 0.2, 0.2)
        return (losses * grpo.token_weights(mask, "dr_grpo", 6, mask.sum(), 1)).sum()

    whole, old = ((logps * x.mask).sum(1, keepdim=True) for logps in (x.logps, x.old_logps))
    assert equal(loss_of(whole, old, torch.ones(6, 1)), theirs, x.logps)
    norm = record_trl.loss_and_norm(loss_of(x.logps, x.old_logps, x.mask), x.logps)["grad_norm"]
    assert (norm == pytest.approx(theirs["grad_norm"], rel=1e-4)) == (drift == 0)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_online_dpo(loss, tie):
    """The losses equal TRL's, except for ties: TRL then takes the first answer as the chosen one.

    Ours gives a tie the loss 0. (TRL's IPO uses sums here, unlike in its DPO trainer.)
    """
    x, theirs = record_trl.completions(80, 0.0), TRL["online_dpo"][f"{loss} tie {tie}"]
    four = [part for logps in (x.logps, x.ref_logps) for part in (logps * x.mask).sum(1).chunk(2)]
    first, second = record_trl.pair_scores(tie).double().chunk(2)
    for lead in 0.0, 1.0 * tie:  # of the first answer of the tie
        first[0] += lead
        ours = online_dpo.online_loss(*four, (first - second).sigmoid(), loss, 0.2, 0.0)
        assert equal(ours.mean(), theirs, x.logps) == (lead > 0 or not tie)


@pytest.mark.parametrize("name", record_trl.LENGTHS)
def test_ppo(name):
    """For answers of full length, TRL differs only in whitening, where it divides by N − 1, not N.

    After a shorter answer, TRL puts the score one token later. That token has a value, which counts
    in the returns and in the critic's loss.
    """
    x, theirs = record_trl.rollout(record_trl.LENGTHS[name]), TRL["ppo"][name]
    columns, ends = torch.arange(9), x.lengths[:, None]
    mask = (columns < ends).long()
    longer = (columns < ends + 1).long()  # as in TRL, one more token unless the length is full

    def losses(value_mask, correction):
        rewards = ppo.token_rewards(torch.zeros(6), x.old_logps, x.ref_logps, mask, x.beta)
        rewards += ppo.token_rewards(x.scores, x.old_logps, x.old_logps, value_mask, x.beta)
        old_values = x.old_values * value_mask
        advantages, returns = ppo.gae(rewards, old_values, value_mask, x.gamma, x.lam)
        advantages = ppo.whiten(advantages, mask) * correction
        policy, _ = ppo.policy_loss(x.logps, x.old_logps, advantages, x.epsilon)
        value = ppo.value_loss(x.values * value_mask, old_values, returns, x.epsilon)
        return (advantages, (policy * mask).sum() / mask.sum(),
                (value * value_mask).sum() / value_mask.sum())

    count = mask.sum()
    advantages, policy, value = losses(longer, ((count - 1) / count).sqrt())
    torch.testing.assert_close(advantages, torch.tensor(theirs["advantages"]), atol=1e-5, rtol=1e-5)
    assert equal(policy, theirs["policy"], x.logps)
    assert equal(value, theirs["value"], x.values)
    assert equal(policy + x.value_weight * value, theirs["whole"], x.logps, x.values)

    _, policy, value = losses(mask, 1)
    assert not equal(policy, theirs["policy"], x.logps)
    assert equal(value, theirs["value"], x.values) == (name == "full")
