"""Records TRL's losses and gradient norms in tests/method/trl.json, on inputs made from seeds.

    pip install trl==1.16.0
    python tests/record_trl.py [ppo_trainer.py of TRL 1.12.0, the last release with PPO]

test_trl.py compares them with ours on the same inputs, without TRL. The trainers' own methods run
here, on tensors; what stands in the middle of a longer method runs line by line from its file.
"""
import inspect
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
LONGEST = 9  # the longest completion allowed


# ---- inputs --------------------------------------------------------------------------------------

def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequences(seed):
    """Three pairs of unequal lengths: hidden states [6, 12, 8], a head, ids and masks."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([[3], [2], [5], [3], [2], [5]])
    ends = torch.tensor([[12], [7], [9], [6], [11], [10]])
    columns = torch.arange(12)
    return SimpleNamespace(
        hidden=normal(seed + 1, 6, 12, 8).requires_grad_(), head=normal(seed + 2, 13, 8) / 2,
        input_ids=torch.randint(0, 13, (6, 12), generator=generator),
        attention_mask=(columns < ends).long(),
        loss_mask=((columns >= starts) & (columns < ends)).long(),
        ref_logps=-4 - 9 * torch.rand(6, generator=generator))


def student_and_teacher():
    """Logits [7, 13] of two models."""
    return (2 * normal(31, 7, 13)).requires_grad_(), 2 * normal(32, 7, 13)


def unpaired(seed):
    """Six labeled answers; and what stands in for them behind the prompts of other ones."""
    x = sequences(seed)
    x.labels = torch.tensor([True, False, False, True, False, False])
    x.mismatched_logps = -20 + normal(seed + 5, 6)
    x.mismatched_ref_logps = x.mismatched_logps - 1 - normal(seed + 6, 6)
    return x


def completions(seed, drift):
    """Log-probs [6, 9] of completions, of their sampler and reference, advantages and mask."""
    mask = (torch.arange(9) < torch.tensor([[9], [3], [6], [1], [8], [5]])).long()
    logps = (-normal(seed, 6, 9).abs() - 0.1).requires_grad_()
    return SimpleNamespace(
        logps=logps, old_logps=logps.detach() + drift * normal(seed + 1, 6, 9),
        ref_logps=logps.detach() + 0.3 * normal(seed + 2, 6, 9),
        advantages=normal(seed + 3, 6), mask=mask)


def comparisons(seed):
    """Rewards [10] of five chosen and five rejected answers."""
    return normal(seed, 10).mul(2).requires_grad_()


def grouped_rewards(seed):
    return normal(seed, 4, 5)


def pair_scores(seed, tie):
    """Scores [6] of three first and three second answers; a tie is that of the first pair."""
    scores = normal(seed, 6)
    scores[3] = scores[0] if tie else scores[3]
    return scores


def rollout(seed, lengths):
    """What PPO knows of answers of these lengths, [6, 9] each: it changes policy and critic a bit.

    Beyond their ends stand the numbers that a model would give there, as a mask has to remove them.
    """
    logps = -normal(seed, 6, 9).abs() - 0.1
    values = normal(seed + 1, 6, 9)
    return SimpleNamespace(
        old_logps=logps, ref_logps=logps + 0.3 * normal(seed + 2, 6, 9), old_values=values,
        logps=(logps + 0.2 * normal(seed + 3, 6, 9)).requires_grad_(),
        values=(values + 0.3 * normal(seed + 4, 6, 9)).requires_grad_(),
        scores=normal(seed + 5, 6), lengths=torch.tensor(lengths),
        gamma=0.9, lam=0.8, beta=0.1, epsilon=0.2, value_weight=0.5)


FULL, SHORT = (9, 9, 9, 9, 9, 9), (9, 3, 6, 1, 8, 5)


def token_logps(x):
    """log p of each trained token [6, 11], else 0."""
    logps = F.log_softmax(x.hidden @ x.head.T, -1)[:, :-1]
    return logps.gather(2, x.input_ids[:, 1:, None])[..., 0] * x.loss_mask[:, 1:]


def loss_and_norm(loss, *leaves):
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    return {"loss": loss.item(), "grad_norm": norm.item()}


# ---- TRL -----------------------------------------------------------------------------------------

def stand_in(**attributes):
    """A trainer of one process that has these attributes; no model is loaded."""
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.accelerator.reduce = lambda x, **kwargs: x
    trainer._metrics = {"train": defaultdict(list)}
    trainer.aux_loss_enabled = False
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def run_lines(file, first, last, names):
    """Runs the lines of a file from one that starts with `first` to one that starts with `last`."""
    lines = Path(file).read_text().splitlines()
    starts = [line.strip() for line in lines]
    begin = next(i for i, line in enumerate(starts) if line.startswith(first))
    end = next(i for i, line in enumerate(starts) if i >= begin and line.startswith(last))
    exec(textwrap.dedent("\n".join(lines[begin:end + 1])), names)


def outputs_of(x):
    """What a model with TRL's head gives: log-probs are 0 where no label is."""
    logps = token_logps(x)
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros,
                           is_top1=zeros.bool(), label_mask=x.loss_mask[:, 1:].bool())


def sft():
    """One batch of six, and the first two rows of it as a part of the same step."""
    from trl import SFTTrainer
    x = sequences(10)
    trainer = stand_in(compute_loss_func=None, label_smoother=None, train_dataset=None)
    trainer.args.loss_type, trainer.args.average_tokens_across_devices = "nll", True
    trainer.accelerator.parallelism_config = None
    trainer.get_tp_size = lambda: 1
    inputs = {"input_ids": x.input_ids, "attention_mask": x.attention_mask,
              "labels": x.input_ids.masked_fill(x.loss_mask == 0, -100)}
    tokens = x.loss_mask.sum()
    whole = SFTTrainer.compute_loss(
        trainer, lambda **kwargs: outputs_of(x), dict(inputs), num_items_in_batch=tokens)
    part = SimpleNamespace(**vars(x))
    for name in "hidden", "input_ids", "loss_mask", "attention_mask":
        setattr(part, name, getattr(x, name)[:2])
    inputs = {name: value[:2] for name, value in inputs.items()}
    first = SFTTrainer.compute_loss(
        trainer, lambda **kwargs: outputs_of(part), inputs, num_items_in_batch=tokens)
    return {"whole": loss_and_norm(whole, x.hidden), "part": loss_and_norm(first, x.hidden)}


def reward_model():
    from trl import RewardTrainer
    record = {}
    for name, (margin, centering) in REWARDS.items():
        rewards = comparisons(20)
        trainer = stand_in()
        trainer.args.center_rewards_coefficient = centering or None
        inputs = {"attention_mask": torch.ones(10, 3)}
        if margin:
            inputs["margin"] = margin * normal(21, 5).abs()
        loss = RewardTrainer.compute_loss(
            trainer, lambda rewards=rewards, **kwargs: SimpleNamespace(logits=rewards[:, None]),
            inputs)
        record[name] = loss_and_norm(loss, rewards)
    return record


def preferences():
    from trl import DPOTrainer
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    record = {}
    for name, (loss_type, trl_name, beta, extra) in PREFERENCES.items():
        x = sequences(30)
        if loss_type in ("dpo", "ipo", "hinge"):
            trainer = stand_in(
                ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
                loss_types=[trl_name], loss_weights=[1.0], use_weighting=False, **extra)
            # one pair at a time, as `aot`, TRL's only DPO loss with smoothing, sorts a batch
            losses = []
            for i in range(3):
                rows = torch.tensor([i, i + 3])
                pair = SimpleNamespace(hidden=x.hidden[rows], head=x.head,
                                       input_ids=x.input_ids[rows], loss_mask=x.loss_mask[rows])
                inputs = {"input_ids": pair.input_ids, "completion_mask": pair.loss_mask,
                          "attention_mask": x.attention_mask[rows],
                          "ref_chosen_logps": x.ref_logps[i:i + 1],
                          "ref_rejected_logps": x.ref_logps[i + 3:i + 4]}
                losses.append(DPOTrainer._compute_loss(
                    trainer, lambda pair=pair, **kwargs: outputs_of(pair), inputs, False))
            loss = torch.stack(losses).mean()
        else:
            kind = ORPOTrainer if loss_type == "orpo" else CPOTrainer
            labels = x.input_ids.masked_fill(x.loss_mask == 0, -100)
            together = {"concatenated_input_ids": x.input_ids, "concatenated_labels": labels,
                        "concatenated_attention_mask": x.attention_mask}
            trainer = stand_in(
                beta=beta, loss_type=trl_name, alpha=0.0, label_smoothing=0.0,
                simpo_gamma=extra.get("gamma"), cpo_alpha=0.0 if loss_type == "simpo" else 1.0,
                is_encoder_decoder=False, get_batch_logps=kind.get_batch_logps,
                concatenated_inputs=lambda *args, together=together, **kwargs: together)
            for method in "concatenated_forward", "cpo_loss", "odds_ratio_loss":
                if hasattr(kind, method):
                    setattr(trainer, method, getattr(kind, method).__get__(trainer))
            loss, metrics = kind.get_batch_loss_metrics(
                trainer, lambda *args, x=x, **kwargs: SimpleNamespace(logits=x.hidden @ x.head.T),
                {"chosen_labels": labels[:3]})
            record[name + "_nll"] = metrics["nll_loss"]
        record[name] = loss_and_norm(loss, x.hidden)
    return record


def kto():
    """One batch, and its halves as micro-batches, with a z each; whose completion is read for z."""
    from trl import KTOTrainer
    from trl.trainer import kto_trainer
    record = {}
    for name, (beta, desirable_weight, undesirable_weight) in KTO.items():
        x = unpaired(80)
        losses, points = [], []
        for rows in slice(0, 6), slice(0, 3), slice(3, 6):
            trainer = stand_in(
                calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=beta,
                desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
            trainer._compute_kl_logps = lambda *args, rows=rows, x=x: x.mismatched_logps[rows]
            part = SimpleNamespace(hidden=x.hidden[rows], head=x.head,
                                   input_ids=x.input_ids[rows], loss_mask=x.loss_mask[rows])
            inputs = {"input_ids": part.input_ids, "attention_mask": x.attention_mask[rows],
                      "completion_mask": part.loss_mask, "label": x.labels[rows],
                      "ref_logps": x.ref_logps[rows],
                      "ref_KL_logps": x.mismatched_ref_logps[rows]}
            losses.append(KTOTrainer._compute_loss(
                trainer, lambda part=part, **kwargs: outputs_of(part), inputs, False))
            points.append(trainer._metrics["train"]["kl"][0])
        whole, *halves = losses
        record[name] = {"z": points[0], "whole": loss_and_norm(whole, x.hidden),
                        "halves": loss_and_norm(sum(halves) / 2, x.hidden)}
    names = {"examples": {"completion_ids": list(range(6))}}
    line = 'examples["KL_completion_ids"] ='
    run_lines(inspect.getfile(kto_trainer), line, line, names)
    return record | {"order": names["examples"]["KL_completion_ids"]}


def group_losses():
    from trl import GRPOConfig, GRPOTrainer
    default = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    record = {"use_bias_correction_kl": default["use_bias_correction_kl"]}
    for loss in GROUP_LOSSES:
        for beta in BETAS:
            for drift in DRIFTS:
                x = completions(40, drift)
                trainer = stand_in(
                    top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
                    importance_sampling_level="sequence" if loss == "gspo" else "token",
                    loss_type="grpo" if loss == "gspo" else loss, beta=beta, epsilon_low=0.2,
                    epsilon_high=1.28 if loss == "cispo" else 0.28, max_completion_length=LONGEST,
                    current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False)
                trainer._get_per_token_logps_and_entropies = lambda *args, x=x, **kwargs: (
                    x.logps, torch.zeros_like(x.logps), None)
                trainer.args.use_bias_correction_kl = record["use_bias_correction_kl"]
                trainer.args.delta, trainer.args.steps_per_generation = None, 1
                inputs = {
                    "prompt_ids": x.mask[:, :0], "prompt_mask": x.mask[:, :0],
                    "completion_ids": x.mask, "completion_mask": x.mask,
                    "advantages": x.advantages, "old_per_token_logps": x.old_logps,
                    "ref_per_token_logps": x.ref_logps, "num_items_in_batch": x.mask.sum()}
                value = GRPOTrainer._compute_loss(trainer, None, inputs)
                record[f"{loss} beta {beta} drift {drift}"] = loss_and_norm(value, x.logps)
    return record


def advantages():
    """What GRPO, with and without the division by the spread, and RLOO make of rewards."""
    from trl.trainer import grpo_trainer, rloo_trainer
    record = {}
    for name, scale in ("group", "group"), ("unscaled", "none"):
        names = vars(grpo_trainer) | {
            "self": stand_in(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
                             reward_weights=torch.ones(1)),
            "rewards_per_func": grouped_rewards(50).view(-1, 1), "num_generations": 5,
            "device": torch.device("cpu")}
        run_lines(inspect.getfile(grpo_trainer), "unscorable_mask =", "advantages = torch.nan_to",
                  names)
        record[name] = names["advantages"].tolist()
    names = vars(rloo_trainer) | {
        "self": stand_in(normalize_advantages=False), "num_generations": 5,
        "rewards": grouped_rewards(50).view(-1)}
    run_lines(inspect.getfile(rloo_trainer), "grouped_rewards =", "advantages = torch.nan_to",
              names)
    return record | {"rloo": names["advantages"].tolist()}


def rloo():
    from trl import RLOOTrainer
    record = {}
    for drift in DRIFTS:
        x = completions(60, drift)
        trainer = stand_in(epsilon_low=0.2, epsilon_high=0.2)
        trainer._get_per_token_logps_and_entropies = lambda *args, x=x, **kwargs: (
            x.logps, torch.zeros_like(x.logps), None)
        inputs = {"prompt_ids": x.mask[:, :0], "prompt_mask": x.mask[:, :0],
                  "completion_ids": x.mask, "completion_mask": x.mask, "advantages": x.advantages,
                  "old_logps": (x.old_logps * x.mask).sum(1)}
        loss = RLOOTrainer._compute_loss(trainer, None, inputs)
        record[f"drift {drift}"] = loss_and_norm(loss, x.logps)
    return record


def online_dpo():
    """Lines of the trainer's step: which answer is chosen, and the loss of the pairs."""
    from trl.experimental.online_dpo import online_dpo_trainer
    record = {}
    for loss, theirs in ("dpo", "sigmoid"), ("ipo", "ipo"):
        for tie in (False, True):
            x = completions(80, 0.0)
            trainer = stand_in(beta=0.2)
            trainer.args.loss_type = theirs
            names = vars(online_dpo_trainer) | {
                "self": trainer, "rewards": pair_scores(81, tie), "batch_size": 3,
                "device": torch.device("cpu"), "completion_mask": x.mask, "logprobs": x.logps,
                "ref_logprobs": x.ref_logps}
            run_lines(inspect.getfile(online_dpo_trainer), "first_half, second_half =",
                      "loss = losses.mean()", names)
            record[f"{loss} tie {tie}"] = loss_and_norm(names["loss"], x.logps)
    return record


def ppo(file):
    """Advantages and losses, line by line from the training loop of TRL 1.12.0."""
    record = {}
    for name, lengths in ("full", FULL), ("short", SHORT):
        x = rollout(70, lengths)
        args = SimpleNamespace(
            kl_estimator="k1", kl_coef=x.beta, whiten_rewards=False, gamma=x.gamma, lam=x.lam,
            cliprange=x.epsilon, cliprange_value=x.epsilon, vf_coef=x.value_weight)
        ends = x.lengths - 1  # of the last token
        # the mask _p1 keeps one more token than the answer has
        columns = torch.arange(9)
        padding, padding_p1 = columns > ends[:, None], columns > ends[:, None] + 1
        names = {
            "torch": torch, "args": args, "responses": torch.zeros(6, 9), "values": x.old_values,
            "scores": x.scores, "logprobs": x.old_logps, "ref_logprobs": x.ref_logps,
            "sequence_lengths": ends, "INVALID_LOGPROB": 1.0, "empty_cache": lambda: None}
        run_lines(file, "def masked_mean", "return whitened", names)
        run_lines(file, "response_idxs =", "advantages = torch.masked_fill", names)
        assert torch.equal(names["padding_mask"], padding)
        assert torch.equal(names["padding_mask_p1"], padding_p1)
        names |= {"micro_batch_inds": slice(None), "vpred": x.values,
                  "new_logprobs": torch.masked_fill(x.logps, padding, 1.0)}
        for theirs, source in ("mb_advantage", "advantages"), ("mb_return", "returns"), (
                "mb_values", "values"), ("mb_logprobs", "logprobs"):
            names[theirs] = names[source]
        run_lines(file, "vpred = torch.masked_fill", "loss = pg_loss", names)
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
    record = {"versions": {"trl": trl.__version__, "torch": torch.__version__,
                           "transformers": transformers.__version__},
              "command": "python tests/record_trl.py ppo_trainer.py", "sft": sft(),
              "reward_model": reward_model(), "preferences": preferences(), "kto": kto(),
              "group_losses": group_losses(), "advantages": advantages(), "rloo": rloo(),
              "online_dpo": online_dpo(), "distillation": distillation()}
    if len(sys.argv) > 1:
        record["versions"]["trl for ppo"] = "1.12.0"
        record["ppo"] = ppo(sys.argv[1])
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
