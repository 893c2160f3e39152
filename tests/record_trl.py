"""Records TRL's losses and gradient norms in tests/method/trl.json, on inputs made from seeds.

    pip install trl==1.16.0
    python tests/record_trl.py [ppo_trainer.py of TRL 1.12.0, the last release with PPO]

test_trl.py compares them with ours on the same inputs, without TRL. The trainers' own methods run
here, on tensors; what stands in the middle of a longer method runs line by line from its file.
"""
import itertools
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

FILE = Path(__file__).with_name("method") / "trl.json"
PREFERENCES = {  # name: (loss of dpo.py, TRL's name, beta, what else)
    "dpo": ("dpo", "sigmoid", 0.2, {}), "dpo_beta": ("dpo", "sigmoid", 1.5, {}),
    "hinge": ("hinge", "hinge", 0.2, {}), "ipo": ("ipo", "ipo", 0.2, {}),
    "smoothed": ("dpo", "aot", 0.2, {"label_smoothing": 0.15}),
    "simpo": ("simpo", "simpo", 2.0, {"gamma": 0.7}),
    "cpo": ("cpo", "sigmoid", 0.3, {}), "orpo": ("orpo", "orpo", 0.4, {})}
KTO = {"plain": (0.1, 1.0, 1.0), "weighted": (0.7, 1.4, 0.6)}  # name: (beta, λ_D, λ_U)
GROUP_LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "gspo")
BETAS = (0.0, 0.3)
DRIFTS = (0.0, 0.05, 0.5)  # how far log-probs are from those of the sampler: the ratios
REWARDS = {"plain": (None, 0.0), "margin": (0.5, 0.0), "centering": (None, 0.1), "both": (0.5, 0.1)}
DIVERGENCES = {"forward": 0.0, "jsd 0.1": 0.1, "jsd 0.5": 0.5, "jsd 0.9": 0.9, "reverse": 1.0}
LENGTHS = {"full": (9, 9, 9, 9, 9, 9), "short": (9, 3, 6, 1, 8, 5)}  # of PPO's answers
LONGEST = 9  # the longest completion allowed


# ---- inputs --------------------------------------------------------------------------------------

def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequences(seed):
    """Three pairs of unequal lengths: hidden states [6, 12, 8], a head, ids and masks.

    For KTO, six labeled answers, and what stands in for them behind the prompts of other ones.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([[3], [2], [5], [3], [2], [5]])
    ends = torch.tensor([[12], [7], [9], [6], [11], [10]])
    columns = torch.arange(12)
    mismatched = -20 + normal(seed + 5, 6)
    return SimpleNamespace(
        hidden=normal(seed + 1, 6, 12, 8).requires_grad_(), head=normal(seed + 2, 13, 8) / 2,
        input_ids=torch.randint(0, 13, (6, 12), generator=generator),
        attention_mask=(columns < ends).long(),
        loss_mask=((columns >= starts) & (columns < ends)).long(),
        ref_logps=-4 - 9 * torch.rand(6, generator=generator),
        labels=torch.tensor([True, False, False, True, False, False]),
        mismatched_logps=mismatched, mismatched_ref_logps=mismatched - 1 - normal(seed + 6, 6))


def rows_of(x, rows):
    """Some of the six sequences."""
    return SimpleNamespace(**{name: value if name == "head" else value[rows]
                              for name, value in vars(x).items()})


def completions(seed, drift):
    """Log-probs [6, 9] of completions, of their sampler and reference, advantages and mask."""
    mask = (torch.arange(9) < torch.tensor(LENGTHS["short"])[:, None]).long()
    logps = (-normal(seed, 6, 9).abs() - 0.1).requires_grad_()
    return SimpleNamespace(
        logps=logps, old_logps=logps.detach() + drift * normal(seed + 1, 6, 9),
        ref_logps=logps.detach() + 0.3 * normal(seed + 2, 6, 9),
        advantages=normal(seed + 3, 6), mask=mask)


def comparisons():
    """Rewards [10] of five chosen and five rejected answers, and what their margins are."""
    return normal(20, 10).mul(2).requires_grad_(), normal(21, 5).abs()


def grouped_rewards():
    return normal(50, 4, 5)


def pair_scores(tie):
    """Scores [6] of three first and three second answers; a tie is that of the first pair."""
    scores = normal(81, 6)
    scores[3] = scores[0] if tie else scores[3]
    return scores


def student_and_teacher():
    """Logits [7, 13] of two models."""
    return (2 * normal(31, 7, 13)).requires_grad_(), 2 * normal(32, 7, 13)


def rollout(lengths):
    """What PPO knows of answers of these lengths, [6, 9] each: it changes policy and critic a bit.

    Beyond their ends stand the numbers that a model would give there, as a mask has to remove them.
    """
    logps, values = -normal(70, 6, 9).abs() - 0.1, normal(71, 6, 9)
    return SimpleNamespace(
        old_logps=logps, ref_logps=logps + 0.3 * normal(72, 6, 9), old_values=values,
        logps=(logps + 0.2 * normal(73, 6, 9)).requires_grad_(),
        values=(values + 0.3 * normal(74, 6, 9)).requires_grad_(),
        scores=normal(75, 6), lengths=torch.tensor(lengths),
        gamma=0.9, lam=0.8, beta=0.1, epsilon=0.2, value_weight=0.5)


def loss_and_norm(loss, *leaves):
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    return {"loss": loss.item(), "grad_norm": norm.item()}


# ---- TRL -----------------------------------------------------------------------------------------

def stand_in(**attributes):
    """A trainer of one process that has these attributes; no model is loaded."""
    trainer = MagicMock(aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1)
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.accelerator.reduce = lambda x, **kwargs: x
    trainer.accelerator.parallelism_config = None
    trainer._metrics = {"train": defaultdict(list)}
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def run_lines(module, first, last, **names):
    """Runs the lines of a module from one that starts with `first` to one that starts with `last`.

    Returns its names, to which `names` were added, as they are afterwards.
    """
    names = vars(module) | names
    lines = Path(module.__file__).read_text().splitlines()
    starts = [line.strip() for line in lines]
    begin = next(i for i, line in enumerate(starts) if line.startswith(first))
    end = next(i for i, line in enumerate(starts) if i >= begin and line.startswith(last))
    exec(textwrap.dedent("\n".join(lines[begin:end + 1])), names)
    return names


def model_of(x):
    """A model with TRL's head: log-probs are 0 where no label is."""
    logits = x.hidden @ x.head.T
    logps = F.log_softmax(logits, -1)[:, :-1].gather(2, x.input_ids[:, 1:, None])[..., 0]
    logps = logps * x.loss_mask[:, 1:]
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(logits=logits, log_probs=logps, entropy=zeros, mean_logits=zeros,
                              is_top1=zeros.bool(), label_mask=x.loss_mask[:, 1:].bool())
    return lambda *args, **kwargs: outputs


def labels_of(x):
    return x.input_ids.masked_fill(x.loss_mask == 0, -100)


def inputs_of(x, **more):
    return {"input_ids": x.input_ids, "attention_mask": x.attention_mask,
            "completion_mask": x.loss_mask} | more


def sft():
    """One batch of six, and the first two rows of it as a part of the same step."""
    from trl import SFTTrainer
    x, record = sequences(10), {}
    for name, rows in ("whole", slice(6)), ("part", slice(2)):
        trainer = stand_in(compute_loss_func=None, label_smoother=None, train_dataset=None,
                           get_tp_size=lambda: 1)
        trainer.args.loss_type, trainer.args.average_tokens_across_devices = "nll", True
        some = rows_of(x, rows)
        loss = SFTTrainer.compute_loss(
            trainer, model_of(some), inputs_of(some, labels=labels_of(some)),
            num_items_in_batch=x.loss_mask.sum())
        record[name] = loss_and_norm(loss, x.hidden)
    return record


def reward_model():
    from trl import RewardTrainer
    record = {}
    for name, (margin, centering) in REWARDS.items():
        rewards, margins = comparisons()
        trainer = stand_in()
        trainer.args.center_rewards_coefficient = centering or None
        inputs = {"attention_mask": torch.ones(10, 3)}
        if margin:
            inputs["margin"] = margin * margins
        output = SimpleNamespace(logits=rewards[:, None])
        loss = RewardTrainer.compute_loss(trainer, MagicMock(return_value=output), inputs)
        record[name] = loss_and_norm(loss, rewards)
    return record


def dpo_loss(x, loss_type, beta, extra):
    """One pair at a time, as `aot`, TRL's only DPO loss with smoothing, sorts a batch."""
    from trl import DPOTrainer
    trainer = stand_in(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        loss_types=[loss_type], loss_weights=[1.0], use_weighting=False, **extra)
    losses = []
    for i in range(3):
        pair = rows_of(x, [i, i + 3])
        inputs = inputs_of(pair, ref_chosen_logps=pair.ref_logps[:1],
                           ref_rejected_logps=pair.ref_logps[1:])
        losses.append(DPOTrainer._compute_loss(trainer, model_of(pair), inputs, False))
    return torch.stack(losses).mean()


def cpo_or_orpo_loss(x, kind, loss_type, beta, extra):
    inputs = inputs_of(x, labels=labels_of(x))
    together = {f"concatenated_{name}": value for name, value in inputs.items()}
    trainer = stand_in(
        beta=beta, loss_type=loss_type, alpha=0.0, label_smoothing=0.0,
        simpo_gamma=extra.get("gamma"), cpo_alpha=0.0 if loss_type == "simpo" else 1.0,
        is_encoder_decoder=False, get_batch_logps=kind.get_batch_logps,
        concatenated_inputs=MagicMock(return_value=together))
    for method in "concatenated_forward", "cpo_loss", "odds_ratio_loss":
        if hasattr(kind, method):
            setattr(trainer, method, getattr(kind, method).__get__(trainer))
    return kind.get_batch_loss_metrics(
        trainer, model_of(x), {"chosen_labels": inputs["labels"][:3]})


def preferences():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    record = {}
    for name, (loss_type, trl_name, beta, extra) in PREFERENCES.items():
        x = sequences(30)
        if loss_type in ("dpo", "ipo", "hinge"):
            loss = dpo_loss(x, trl_name, beta, extra)
        else:
            kind = ORPOTrainer if loss_type == "orpo" else CPOTrainer
            loss, metrics = cpo_or_orpo_loss(x, kind, trl_name, beta, extra)
            record[name + "_nll"] = metrics["nll_loss"]
        record[name] = loss_and_norm(loss, x.hidden)
    return record


def kto():
    """One batch, and its halves as micro-batches, with a z each; whose completion is read for z."""
    from trl import KTOTrainer
    from trl.trainer import kto_trainer
    record = {}
    for name, (beta, desirable_weight, undesirable_weight) in KTO.items():
        x, losses, points = sequences(80), [], []
        for rows in slice(0, 6), slice(0, 3), slice(3, 6):
            some = rows_of(x, rows)
            trainer = stand_in(
                calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=beta,
                desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
                _compute_kl_logps=MagicMock(return_value=some.mismatched_logps))
            inputs = inputs_of(some, label=some.labels, ref_logps=some.ref_logps,
                               ref_KL_logps=some.mismatched_ref_logps)
            losses.append(KTOTrainer._compute_loss(trainer, model_of(some), inputs, False))
            points.append(trainer._metrics["train"]["kl"][0])
        whole, *halves = losses
        record[name] = {"z": points[0], "whole": loss_and_norm(whole, x.hidden),
                        "halves": loss_and_norm(sum(halves) / 2, x.hidden)}
    line = 'examples["KL_completion_ids"] ='
    names = run_lines(kto_trainer, line, line, examples={"completion_ids": list(range(6))})
    return record | {"order": names["examples"]["KL_completion_ids"]}


def sampled_loss(kind, x, **attributes):
    """The loss of GRPO's or RLOO's trainer for completions."""
    trainer = stand_in(
        _get_per_token_logps_and_entropies=MagicMock(
            return_value=(x.logps, torch.zeros_like(x.logps), None)), **attributes)
    trainer.args.use_bias_correction_kl = True
    trainer.args.delta, trainer.args.steps_per_generation = None, 1
    inputs = {"prompt_ids": x.mask[:, :0], "prompt_mask": x.mask[:, :0], "completion_ids": x.mask,
              "completion_mask": x.mask, "advantages": x.advantages,
              "old_per_token_logps": x.old_logps, "ref_per_token_logps": x.ref_logps,
              "old_logps": (x.old_logps * x.mask).sum(1), "num_items_in_batch": x.mask.sum()}
    return loss_and_norm(kind._compute_loss(trainer, None, inputs), x.logps)


def group_losses():
    from trl import GRPOConfig, GRPOTrainer
    assert GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default is True
    record = {"use_bias_correction_kl": True}
    for loss, beta, drift in itertools.product(GROUP_LOSSES, BETAS, DRIFTS):
        record[f"{loss} beta {beta} drift {drift}"] = sampled_loss(
            GRPOTrainer, completions(40, drift), beta=beta, epsilon_low=0.2,
            epsilon_high=1.28 if loss == "cispo" else 0.28, max_completion_length=LONGEST,
            importance_sampling_level="sequence" if loss == "gspo" else "token",
            loss_type="grpo" if loss == "gspo" else loss, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1)
    return record


def rloo():
    from trl import RLOOTrainer
    return {f"drift {drift}": sampled_loss(
        RLOOTrainer, completions(60, drift), epsilon_low=0.2, epsilon_high=0.2)
        for drift in DRIFTS}


def advantages():
    """What GRPO, with and without the division by the spread, and RLOO make of rewards."""
    from trl.trainer import grpo_trainer, rloo_trainer
    rewards, last = grouped_rewards().flatten(), "advantages = torch.nan_to"
    record = {}
    for name, scale in ("group", "group"), ("unscaled", "none"):
        trainer = stand_in(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
                           reward_weights=torch.ones(1))
        record[name] = run_lines(grpo_trainer, "unscorable_mask =", last, self=trainer,
                                 rewards_per_func=rewards[:, None], num_generations=5,
                                 device=torch.device("cpu"))
    record["rloo"] = run_lines(rloo_trainer, "grouped_rewards =", last, rewards=rewards,
                               self=stand_in(normalize_advantages=False), num_generations=5)
    return {name: names["advantages"].tolist() for name, names in record.items()}


def online_dpo():
    """Lines of the trainer's step: which answer is chosen, and the loss of the pairs."""
    from trl.experimental.online_dpo import online_dpo_trainer
    record = {}
    for (loss, theirs), tie in itertools.product((("dpo", "sigmoid"), ("ipo", "ipo")), (0, 1)):
        x, trainer = completions(80, 0.0), stand_in(beta=0.2)
        trainer.args.loss_type = theirs
        names = run_lines(
            online_dpo_trainer, "first_half, second_half =", "loss = losses.mean()", self=trainer,
            rewards=pair_scores(tie), batch_size=3, device=torch.device("cpu"),
            completion_mask=x.mask, logprobs=x.logps, ref_logprobs=x.ref_logps)
        record[f"{loss} tie {bool(tie)}"] = loss_and_norm(names["loss"], x.logps)
    return record


def ppo(file):
    """Advantages and losses, line by line from the training loop of TRL 1.12.0."""
    module, record = SimpleNamespace(__file__=file), {}
    for name, lengths in LENGTHS.items():
        x = rollout(lengths)
        args = SimpleNamespace(
            kl_estimator="k1", kl_coef=x.beta, whiten_rewards=False, gamma=x.gamma, lam=x.lam,
            cliprange=x.epsilon, cliprange_value=x.epsilon, vf_coef=x.value_weight)
        names = run_lines(module, "def masked_mean", "return whitened", torch=torch)
        names = run_lines(
            module, "response_idxs =", "advantages = torch.masked_fill", **names, args=args,
            responses=torch.zeros(6, 9), values=x.old_values, scores=x.scores,
            logprobs=x.old_logps, ref_logprobs=x.ref_logps, sequence_lengths=x.lengths - 1,
            INVALID_LOGPROB=1.0, empty_cache=lambda: None)
        padding = names["padding_mask"]
        batch = {"mb_advantage": names["advantages"], "mb_return": names["returns"],
                 "mb_values": names["values"], "mb_logprobs": names["logprobs"],
                 "new_logprobs": torch.masked_fill(x.logps, padding, 1.0)}
        names = run_lines(module, "vpred = torch.masked_fill", "loss = pg_loss",
                          **names | batch, micro_batch_inds=slice(None), vpred=x.values)
        record[name] = {
            "advantages": (names["advantages"] * ~padding).tolist(),
            "policy": loss_and_norm(names["pg_loss"], x.logps),
            "value": loss_and_norm(names["vf_loss"], x.values),
            "whole": loss_and_norm(names["loss"], x.logps, x.values)}
    return record


def distillation():
    """GKD's divergence of 7 positions over a vocabulary of 13, with a temperature of 0.7."""
    from trl.experimental.gkd import GKDTrainer
    record = {}
    for name, beta in DIVERGENCES.items():
        student, teacher = student_and_teacher()
        loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.7,
                                               reduction="sum")
        record[name] = loss_and_norm(loss, student)
    return record


def main():
    import transformers
    import trl
    torch.set_num_threads(1)
    methods = (sft, reward_model, preferences, kto, group_losses, advantages, rloo, online_dpo,
               distillation)
    record = {"versions": {"trl": trl.__version__, "torch": torch.__version__,
                           "transformers": transformers.__version__},
              "command": "python tests/record_trl.py ppo_trainer.py"}
    record |= {method.__name__: method() for method in methods}
    if len(sys.argv) > 1:
        record["versions"]["trl for ppo"] = "1.12.0"
        record["ppo"] = ppo(sys.argv[1])
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
