"""Deliberate mistakes, each with the tests that must catch it: whether the tests can fail.

    python tests/mutants.py            # all of them
    python tests/mutants.py 3 17       # some of them, by number

They are such as a competent engineer makes: a proven function is handed the wrong tensor, a mean
is over the wrong thing, an adapter, a detach or a lock is forgotten. The program copies the project
to a temporary folder, puts one mistake at a time there and runs the tests named beside it, in a
process forked from one that has imported the libraries. A line of the table is

    what is wrong, "FILE: EXPRESSION" for pytest -k in tests/test_FILE.py, old text, new text

where the old text stands exactly once in the script. It ends with exit code 1 if a mistake
survives that is not in EQUIVALENT, or no longer applies.
"""
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in common.py

import bitsandbytes  # noqa: E402, F401  what takes long to import is imported once, before forking
import datasets  # noqa: E402, F401
import hypothesis  # noqa: E402, F401
import peft  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402, F401
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400  # seconds; a mistake that makes its tests hang is caught too

BY_HAND = {"sft": "sft_reward_loop: loop_equals and [3-sft]",
           "reward_model": "sft_reward_loop: loop_equals and [3-reward_model]",
           "dpo": "dpo: loop_does and hinge",
           "ppo": "ppo_run: two_steps and not sample and not checkpointing",
           "grpo": "grpo_run: equals_plain and [grpo-3]"}

COMMON = [
    ("a T4, which torch says supports bf16, gets it", "common: dtype_goes_by",
     "torch.cuda.get_device_capability(device) >= (8, 0)", "torch.cuda.is_bf16_supported()"),
    ("forward passes on a CPU are in bf16", "common: scaled_in_fp16_only",
     'torch.autocast(kind, choose_dtype(model.device), enabled=kind == "cuda")',
     "torch.autocast(kind, torch.bfloat16)"),
    ("gradients are scaled in every number format", "common: scaled_in_fp16_only",
     "enabled=fp16)", "enabled=True)"),
    ("bf16 GPUs, not fp16 ones, get repeated keys", "common: attention_below_ampere",
     "if choose_dtype(device) == torch.float16:", "if choose_dtype(device) == torch.bfloat16:"),
    ("all weights are trained in 4 bits", "common: full_training",
     'quantise = load_in_4bit == "on" and not full', 'quantise = load_in_4bit == "on"'),
    ("the constants of NF4 are not quantised", "common: four_bit_is_the_model",
     "bnb_4bit_use_double_quant=True", "bnb_4bit_use_double_quant=False"),
    ("a model that is only used asks for gradients", "common: full_training",
     "model.requires_grad_(full)", "model.requires_grad_(True)"),
    ("no copy of the first adapter is kept", "common: adapters_off",
     'model.load_adapter(find(name), "reference", is_trainable=False)', "pass"),
    ("the dropout of a loaded adapter stays", "common: no_dropout", "module.p = 0.0", "pass"),
    ("the scalar head is trained in 16 bits",
     "sft_reward_loop: agrees_with_one_in_32 and dtype1-reward_model",
     "parameter.data = parameter.data.float()", "pass"),
    ("checkpoints are reentrant, which needs inputs with gradients",
     "common: checkpointing_gives_the_same", '"use_reentrant": False', '"use_reentrant": True'),
    ("broken weights are not noticed", "bad_input: broken_models_are_named and nan and sft",
     "isfinite() for p in weights)", "isfinite() for p in [])"),
    ("capped logits are not noticed", "common: change_their_logits",
     "> 0.01 * logits.abs().max()", "> 10 * logits.abs().max()"),
    ("what is trained is not put back after another role", "common: roles_share",
     "    for p, is_trained in trained:\n        p.requires_grad_(is_trained)\n", ""),
    ("the reference of an adapter is the bare base", "common: reference_is_the_start and adapter",
     '"reference" if "reference" in model.peft_config else None', "None"),
    ("the reference of a new adapter is the policy", "common: reference_is_the_start and [base]",
     '"reference" if "reference" in model.peft_config else None',
     '"reference" if "reference" in model.peft_config else "default"'),
    ("a reward model on another base is taken", "ppo: a_wrong_reward",
     "if Path(base).resolve() != Path(wanted).resolve():", "if not base or not wanted:"),
    ("a new role freezes the policy", "common: roles_share",
     "p.requires_grad_(trained.get(key, trainable))", "p.requires_grad_(trainable)"),
    ("a role's matrices overwrite the policy's", "common: roles_share",
     "weights, adapter_name=role)", 'weights, adapter_name="default")'),
    ("a role's head stays as torch drew it", "common: roles_share",
     "head.weight.data.copy_(score)", "pass"),
    ("the frozen reward head asks for gradients", "common: roles_share",
     "return head.requires_grad_(trainable)", "return head"),
    ("the file of a start may lack weights", "bad_input: broken_adapters_are_named and dpo",
     'warnings.filterwarnings("error"', 'warnings.filterwarnings("ignore"'),
    ("the file of a reward model may lack weights", "common: lack_weights",
     'if any(f".{role}." in key for key in missing):', "if not missing:"),
    ("all adapters are saved", "common: one_adapter_is_saved and roles",
     '"selected_adapters": ["default"], ', ""),
    ("the adapter loaded last is saved", "common: one_adapter_is_saved and [adapter]",
     '"selected_adapters": ["default"]', '"selected_adapters": list(model.peft_config)[-1:]'),
    ("a reward model started from an adapter has other matrices", "common: takes_over",
     "config = adapter_config(adapter_name) if adapter_name else new", "config = new"),
    ("a new pad token is beyond the embeddings", "common_rows: pad_that_is_eos",
     "tokenizer.pad_token = tokenizer.eos_token  #",
     'tokenizer.add_special_tokens({"pad_token": "[P]"})  #'),
    ("an added token beyond the embeddings is not noticed", "common_rows: ids_beyond",
     "max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, *spoken)", "tokenizer.vocab_size - 1"),
    ("ids change with the calendar", "templates: calendar",
     "tokenizer.chat_template = date + tokenizer.chat_template", "pass"),
    ("a base model keeps an end of turn it never learned", "common_rows: a_base_model_ends",
     "generation_config, template=False)", "generation_config)"),
    ("in a base model's template users' turns end in eos, too", "common_rows: a_base_model_ends",
     "{tokenizer.eos_token!r}, 1)", "{tokenizer.eos_token!r})"),
    ("the template's end of turn does not stop an answer", "common_rows: stop_tokens_come",
     "end_of_turn_id(tokenizer) if template else None", "None"),
    ("the model's own stop tokens do not stop an answer", "common_rows: stop_tokens_come",
     ", *(own if isinstance(own, list) else [own])]", "]"),
    ("special tokens that data spells are special", "templates: no_data_becomes",
     "x[0][0] + QUOTE + x[0][1:]", "x[0]"),
    ("tools do not reach the template", "sft: tools_are_read", " tools=tools,\n", "\n"),
    ("the header of an answer is trained", "sft: only_what_the_model",
     "add_generation_prompt=add_generation_prompt, tokenize=False)", "tokenize=False)"),
    ("answers within the prompt are trained", "common_rows: only_turns",
     "range(first, len(chat))", "range(len(chat))"),
    ("a row that a template divides keeps its last answer only", "sft: rewrites_turns",
     "[turn], tools) for turn in turns]", "[turn], tools) for turn in turns[-1:]]"),
    ("prompt and answer are tokenised apart", "common_rows: text_is_tokenised_as_one",
     'ids = tokenizer(prompt + answer)["input_ids"]',
     'ids = tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]'),
    ("an answer that ends in eos gets another", "common_rows: eos_once",
     "    if ids[-1] != tokenizer.eos_token_id:\n", "    if ids:\n"),
    ("the newline behind an end of turn is trained", "reward_model: sequences_end",
     "stop = stops[0] + 1 if stops else len(after)", "stop = len(after)"),
    ("the end of turn is not trained", "sft: only_what_the_model",
     "stop = stops[0] + 1 if stops", "stop = stops[0] if stops"),
    ("the first answer is there twice", "common_rows: only_turns",
     "        done = stop\n", "        done = start\n"),
    ("texts without a prompt share no tokens", "common_rows: texts_share",
     "if not prompt and isinstance(answers[0], str):", "if prompt and not answers:"),
    ("empty values are dropped like absent ones", "common_rows: without_nones",
     "if item is not None", "if item"),
    ("a Hub dataset is always shuffled alike", "common_rows: hub_rows",
     ".shuffle(seed=seed)", ".shuffle(seed=0)"),
    ("examples may be longer than the model can read", "common_rows: as_long_as",
     "min(max_length, tokenizer.model_max_length))\n", "max_length)\n"),
    ("held-out rows are read from the training file", "common_rows: come_from",
     "load_rows(args.eval_dataset,", "load_rows(args.dataset,"),
    ("a held-out file is read whole", "common_rows: come_from",
     "args.eval_size, args.seed)[:args.eval_size]", "args.eval_size, args.seed)"),
    ("another answer to a held-out prompt is trained on", "common_rows: no_prompt_is_both",
     'if tuple(example["prompt"]) not in prompts]', "if example not in held_out]"),
    ("what is held out does not follow from the seed", "common_rows: no_prompt_is_both",
     "torch.Generator().manual_seed(args.seed)", "torch.Generator().manual_seed(0)"),
    ("a reward that calls sys.exit ends the run in silence", "common: a_phase_turns",
     "except (Exception, SystemExit) as error:", "except Exception as error:"),
    ("out of memory is taken for a user's mistake", "common: a_user_can_mend",
     "    except torch.OutOfMemoryError:\n        raise\n", ""),
    ("the first process waits for the others to speak", "common: the_first_speaks",
     "if RANK > 0:\n        time.sleep(3)", "if RANK == 0:\n        time.sleep(3)"),
    ("the tiny model's held-out rows go with any data", "common: defaults_go_by",
     "flags.set_defaults(eval_dataset=None)", "pass"),
]

SFT = [
    ("the loss is a mean over the micro-batch", BY_HAND["sft"],
     "pad_id), trained_tokens)\n            scaler",
     "pad_id), count_trained(rows))\n            scaler"),
    ("the loss is a mean over the share of the process", "sft_reward_loop: two_proc and [sft]",
     "tokens = count_trained(batch)",
     "tokens = count_trained(batch[common.RANK::common.WORLD])"),
    ("the logged loss is that of the first process", "sft_reward_loop: two_proc and [sft]",
     "        sum_over_processes([loss])\n        metrics", "        metrics"),
    ("all epochs have one order", "sft_reward_loop: an_epoch_is and [sft]",
     "for epoch in range(args.epochs)]", "for epoch in range(1)] * args.epochs"),
    ("the noise of a step does not follow from the seed", "runs: goes_on_wherever and [sft]",
     "torch.manual_seed(args.seed + step * common.WORLD + common.RANK)", "pass"),
    ("evaluation leaves the model in evaluation mode", "sft_reward_loop: change_nothing and [sft]",
     "    sum_over_processes([loss])\n    model.train()\n", "    sum_over_processes([loss])\n"),
    ("the held-out loss is a sum of means", "sft_reward_loop: peft_alone and [sft]",
     "pad_id), trained_tokens)\n    sum_over",
     "pad_id), count_trained(rows))\n    sum_over"),
    ("after training, training rows are evaluated", "sft_reward_loop: peft_alone and [sft]",
     "after = evaluate(model, held_out, args", "after = evaluate(model, examples, args"),
    ("samples end at eos alone", "sft: only_adds_stop_tokens",
     "eos_token_id=common.stop_token_ids(tokenizer, model.generation_config))",
     "eos_token_id=tokenizer.eos_token_id)"),
    ("samples are cut by the model's own top-k", "sft: only_adds_stop_tokens", "top_k=0, ", ""),
    ("prompts are padded on the right to sample", "sft: prompts_beside_it",
     'padding_side="left"', 'padding_side="right"'),
    ("an answer that others outlast has not stopped", "sft: at_the_limit",
     "not stop_ids.isdisjoint(ids)", "ids[-1] in stop_ids"),
    ("NEFTune's noise is there in evaluation, too", "sft: neftune_noise",
     "if not base.training:", "if base is None:"),
    ("the length in NEFTune's bound counts padding", "sft: neftune_noise",
     'kwargs["attention_mask"].sum(-1)[:, None, None]',
     'torch.ones_like(kwargs["attention_mask"]).sum(-1)[:, None, None]'),
    ("the softmax is in 16 bits", "sft: confident_tokens and dtype1",
     "head(hidden).float().div_(temperature)", "head(hidden).div(temperature)"),
    ("the mask is shifted by one", "sft: log_probs_and_gradients and 1000",
     'scored = batch["loss_mask"][:, 1:].bool()', 'scored = batch["loss_mask"][:, :-1].bool()'),
    ("a long example loses its answer first", "sft: shortening_keeps",
     "min(length - max_length, start - max_length // 2)", "0"),
]

REWARD_MODEL = [
    ("the reward is read at the padding", "reward_model: padding_changes",
     'last = inputs["attention_mask"].sum(-1) - 1', "last = torch.full((len(hidden),), -1)"),
    ("columns are left out that one row needs", "reward_model: padding_changes",
     'batch["attention_mask"].any(0)', 'batch["attention_mask"].all(0)'),
    ("the reward is read before the last token", "reward_model: only_the_last",
     'inputs["attention_mask"].sum(-1) - 1', 'inputs["attention_mask"].sum(-1) - 2'),
    ("autocast rounds the rewards", "reward_model: under_autocast",
     "(hidden.float() * head.weight.float()).sum(-1)", "(hidden @ head.weight.T)[:, 0]"),
    ("a margin asks for less distance", "reward_model: a_margin_asks",
     "chosen - rejected - m)", "chosen - rejected + m)"),
    ("the margin of the data is not used", BY_HAND["reward_model"],
     'torch.tensor([pair["margin"] for pair in pairs]', "torch.tensor([0.0 for pair in pairs]"),
    ("centering pulls rewards together, not to 0", "reward_model: a_shift",
     "centering * (chosen + rejected) ** 2", "centering * (chosen - rejected) ** 2"),
    ("--centering is not used", BY_HAND["reward_model"],
     "m, args.centering)", "m, 0.01)"),
    ("pairs are laid out one way and read another", BY_HAND["reward_model"],
     '[pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]',
     '[pair[side] for pair in pairs for side in ("chosen", "rejected")]'),
    ("the loss is a mean over the micro-batch", BY_HAND["reward_model"],
     "scored[0].sum() / len(batch)", "scored[0].mean()"),
    ("the scores of a micro-batch overwrite the last one's", BY_HAND["reward_model"],
     "scores[:, rows] = scored.detach()", "scores[:, :len(rows)] = scored.detach()"),
    ("the logged scores are those of the first process",
     "sft_reward_loop: two_proc and [reward_model]",
     "        sum_over_processes([scores])\n        metrics", "        metrics"),
    ("a tie counts as right", "reward_model: a_tie_is",
     "(chosen > rejected) + 0.5 * (chosen == rejected)", "(chosen >= rejected).float()"),
    ("the spread is that of the margins", "reward_model: a_tie_is",
     "rewards.std(correction=0)", "(chosen - rejected).std(correction=0)"),
    ("evaluation leaves the model in evaluation mode",
     "sft_reward_loop: change_nothing and [reward_model]",
     "    sum_over_processes([scores])\n    model.train()\n", "    sum_over_processes([scores])\n"),
    ("the saved pad token ends answers", "reward_model: saved_pad_token",
     "if tokenizer.pad_token_id in ends and others:", "if tokenizer.pad_token_id is None:"),
    ("the best pair is shown as the worst", "reward_model: the_pair_shown", "argmin()", "argmax()"),
    ("a pair of exactly --max-length is dropped", "reward_model: overlong_pairs",
     "if len(ids) > max_length:", "if len(ids) >= max_length:"),
    ("chosen and rejected are exchanged", "reward_model: sequences_end",
     '("chosen", chosen), ("rejected", rejected)', '("rejected", chosen), ("chosen", rejected)'),
    ("what a run was before it is measured again as it goes on",
     "sft_reward_loop: an_overflow and [reward_model]", 'if "before" not in state:', "if state:"),
]

DPO = [
    ("the loss is a mean over the micro-batch", BY_HAND["dpo"],
     "losses.sum() / len(batch)", "losses.mean()"),
    ("a short last batch is divided by --batch-size", BY_HAND["dpo"],
     "losses.sum() / len(batch)", "losses.sum() / args.batch_size"),
    ("the reference of an adapter is the bare base", "dpo: starts_at_log_2",
     "common.reference(model):", "model.disable_adapter():"),
    ("gradients flow into the reference", "dpo: losses_with_a_reference and [dpo]",
     "with torch.no_grad(), common.reference(model):", "with common.reference(model):"),
    ("label smoothing has the wrong sign", "dpo: each_loss and [dpo]",
     "F.logsigmoid(margin) - ε * F.logsigmoid(-margin)",
     "F.logsigmoid(margin) + ε * F.logsigmoid(-margin)"),
    ("--label-smoothing is not handed on", "dpo: loop_does and not loss and not adapter",
     "args.label_smoothing, args.gamma)", "0.0, args.gamma)"),
    ("--gamma is not handed on", "dpo: loop_does and simpo",
     "args.label_smoothing, args.gamma)", "args.label_smoothing)"),
    ("ORPO takes sums instead of means", "dpo: each_loss and [orpo]",
     'if loss in ("simpo", "orpo"):  # means', 'if loss == "simpo":  # means'),
    ("the length of an answer counts its prompt", "dpo: loop_does and simpo",
     'lengths = batch["loss_mask"]', 'lengths = batch["attention_mask"]'),
    ("IPO's margin is scaled by β", "dpo: each_loss and [ipo]",
     "(margin / beta - 1 / (2 * beta))", "(margin - 1 / (2 * beta))"),
    ("ORPO's odds of a certain answer are infinite", "dpo: orpo_stays",
     "log_p = logps.clamp(max=-1e-6)", "log_p = logps"),
    ("CPO reads a reference", "dpo: losses_with_a_reference and [cpo]",
     'not in ("simpo", "orpo", "cpo")', 'not in ("simpo", "orpo")'),
    ("accuracy and margin are those of log-probs", "dpo: starts_at_log_2",
     "rewards.chunk(2)\n    right", "logps.chunk(2)\n    right"),
    ("a tie counts as wrong", "dpo: starts_at_log_2",
     "(chosen > rejected) + 0.5 * (chosen == rejected)", "(chosen > rejected).float()"),
    ("an answer's log-prob is a mean over the row", BY_HAND["dpo"],
     "token_logps(model, batch).sum(-1)  # [2P]", "token_logps(model, batch).mean(-1)"),
    ("evaluation leaves the model in evaluation mode", "dpo: evaluating_and_sampling",
     "    sum_over_processes([sums])\n    model.train()\n", "    sum_over_processes([sums])\n"),
    ("samples are cut by the model's own top-p", "dpo: answers_are_sampled", "top_p=1.0,", ""),
    ("samples end at eos alone", "dpo: answers_are_sampled",
     "eos_token_id=common.stop_token_ids(tokenizer, model.generation_config))",
     "eos_token_id=tokenizer.eos_token_id)"),
    ("answers after training have another seed", "dpo: order_of_the_same_data",
     "    answers = sample_answers(model, tokenizer, prompts, 64, args.seed)",
     "    answers = sample_answers(model, tokenizer, prompts, 64, args.seed + 1)"),
    ("answers are sampled to training prompts", "dpo: order_of_the_same_data",
     "for pair in held_out[:3]]", "for pair in pairs[:3]]"),
    ("the order of the data does not follow from the seed", "dpo: order_of_the_same_data",
     "generator = torch.Generator().manual_seed(args.seed)",
     "generator = torch.Generator().manual_seed(0)"),
    ("all epochs have one order", "dpo: order_covers",
     "for epoch in range(args.epochs)]", "for epoch in range(1)] * args.epochs"),
    ("after training, training pairs are evaluated", BY_HAND["dpo"],
     "tokenizer, evaluate(model, held_out", "tokenizer, evaluate(model, pairs"),
    ("each side of a pair loses another part of its prompt", "dpo: truncation_keeps",
     "pair[side] = shorten(example, longest,",
     'pair[side] = shorten(example, len(example["input_ids"]),'),
    ("a prompt gives way down to its last token", "dpo: truncation_keeps",
     "min(length - max_length, start - max_length // 2)", "min(length - max_length, start - 1)"),
    ("masks are padded with the pad id", "dpo: collate_masks",
     'padding = pad_id if name == "input_ids" else 0', "padding = pad_id"),
    ("the rate falls over --max-steps, though there are fewer", BY_HAND["dpo"],
     "learning_rate(step, len(batches),", "learning_rate(step, args.max_steps,"),
    ("the softmax is in 16 bits", "dpo: confident_tokens",
     "head(hidden).float().div_(temperature)", "head(hidden).div(temperature)"),
    ("the last steps are not saved", "runs: goes_on_wherever and [dpo]",
     "if step % args.save_every == 0 or step == len(batches):", "if step % args.save_every == 0:"),
]

PPO = [
    ("values stand at the end of the padding", "ppo: ",
     "F.pad(values, (0, int((~used).sum())))", "F.pad(values, (int((~used).sum()), 0))"),
    ("the old values are the reward model's", BY_HAND["ppo"],
     'with common.using(model, "critic"):\n        batch["values"]',
     'with common.using(model, "reward"):\n        batch["values"]'),
    ("the policy is scored at temperature 1", "ppo_run: ratio_is_1",
     "logps = token_logps(model, micro, args.temperature)", "logps = token_logps(model, micro)"),
    ("the reference is scored at temperature 1", BY_HAND["ppo"],
     'batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)',
     'batch["ref_logps"] = in_parts(token_logps, model, batch, 1.0, args)'),
    ("γ and λ are exchanged", BY_HAND["ppo"], "mask, args.gamma, args.lam)",
     "mask, args.lam, args.gamma)"),
    ("the critic learns whitened advantages", BY_HAND["ppo"], '"returns": returns}',
     '"returns": whiten(advantages, mask) + batch["values"]}'),
    ("the value clip is around the new values", BY_HAND["ppo"],
     'value_loss(values, micro["values"],', "value_loss(values, values.detach(),"),
    ("minibatches count alike, however many tokens they have", BY_HAND["ppo"],
     'tokens = batch["loss_mask"][rows].sum()',
     'tokens = batch["loss_mask"].sum() // args.minibatches'),
    ("the policy loss is a mean over the micro-batch", "ppo_run: two_steps and sample",
     "(policy * mask).sum() / tokens)", "(policy * mask).sum() / mask.sum())"),
    ("the KL to the sampler is that of the other direction", BY_HAND["ppo"],
     "k3 = error - log_ratio", "k3 = (-log_ratio).exp() - 1 + log_ratio"),
    ("the critic does not start as the reward model", BY_HAND["ppo"],
     'None if scorer else args.reward, "critic"', 'None, "critic"'),
    ("answers that stop are penalised", BY_HAND["ppo"],
     '* ~batch["stopped"]', '* batch["stopped"]'),
    ("explained variance is that of whitened advantages", BY_HAND["ppo"],
     "moments(advantages, mask)[1]", "moments(whiten(advantages, mask), mask)[1]"),
    ("epochs end by the KL of all of them", "ppo_run: target_kl",
     "figures[-args.minibatches:]", "figures"),
    ("all steps sample with one seed", "ppo_run: ratio_is_1",
     "10**6 * (step * common.WORLD + common.RANK)", "10**6 * (common.WORLD + common.RANK)"),
    ("all parts of a rollout sample with one seed", "ppo_run: ratio_is_1",
     "part, 1, args, seed + i)", "part, 1, args, seed)"),
    ("all epochs have the same minibatches", "ppo_run: a_telling_one",
     "args.seed + step * args.epochs + epoch)", "args.seed + step * args.epochs)"),
    ("the critic's head is not trained", "ppo_run: leaves_the_critic_new",
     " + [critic_head.weight]\n", "\n"),
    ("the KL is per token", BY_HAND["ppo"],
     'batch["ref_logps"]).sum(1)', 'batch["ref_logps"]).mean(1)'),
    ("a value has read the token it is to foretell", "ppo: values_are_read",
     "hidden[:, :-1].float() * head.weight", "hidden[:, 1:].float() * head.weight"),
    ("an answer's last value is followed by that of padding", "ppo: double_sum",
     "next_value = values[:, t] * mask[:, t]", "next_value = values[:, t]"),
    ("the clip takes the larger gain", "ppo: clip_cells",
     "-torch.min(free, bound)", "-torch.max(free, bound)"),
    ("the value loss takes the smaller error", "ppo: value_clip",
     "0.5 * torch.max(", "0.5 * torch.min("),
    ("the score comes as many tokens in as the answer is long", "ppo: each_token_pays",
     "last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)",
     "last = mask.sum(1) - 1"),
    ("being far from the reference pays", "ppo: each_token_pays",
     "rewards = -beta * (logps - ref_logps)", "rewards = beta * (logps - ref_logps)"),
    ("every step has the prompts of the first", "ppo_run: a_telling_one",
     "order[(step - 1) * args.batch_size:step * args.batch_size]", "order[:args.batch_size]"),
    ("held-out answers after training have another seed", "ppo_run: ratio_is_1",
     "after = describe(rollout(roles, held_out, tokenizer, args, args.seed)",
     "after = describe(rollout(roles, held_out, tokenizer, args, args.seed + 1)"),
    ("weights decay as torch's AdamW has it", BY_HAND["ppo"], "(weights, weight_decay=0.0)",
     "(weights)"),
    ("the critic is read with the policy's adapter", BY_HAND["ppo"],
     'with common.using(model, "critic"):  # also', 'with common.using(model, "default"):  # also'),
    ("backward computes the critic's activations again with the policy",
     "ppo_run: two_steps and checkpointing",
     "            scaler.scale(args.value_weight", "        scaler.scale(args.value_weight"),
    ("--value-weight is not used", BY_HAND["ppo"], "args.value_weight * (value", "0.5 * (value"),
    ("the reward head reads the policy's hidden states", BY_HAND["ppo"],
     'with common.using(model, "reward"):', 'with common.using(model, "default"):'),
    ("the first token of an answer is not trained", BY_HAND["ppo"],
     "(columns >= starts)", "(columns > starts)"),
    ("the ratio is to the policy itself", "ppo_run: ratio_is_1",
     'policy_loss(logps, micro["logps"],', "policy_loss(logps, logps.detach(),"),
    ("moments are in fp32", "ppo: whitening_keeps", "    x = x.double()\n", ""),
    ("the policy's loss is not scaled", "ppo_run: the_loss_scale",
     "scaler.scale((policy * mask).sum() / tokens).backward()",
     "((policy * mask).sum() / tokens).backward()"),
    ("advantages are white for each process alone", "runs: two_processes_equal_one and [ppo]",
     "    sum_over_processes([sums])\n    count", "    count"),
]

GRPO = [
    ("the spread of a group is divided by G", "grpo: advantages_against",
     "rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, correction=0)"),
    ("the leave-one-out mean counts the completion itself", "grpo: advantages_against",
     "return above * rewards.shape[1] / (rewards.shape[1] - 1)", "return above"),
    ("groups of equal rewards get rounding for advantages", "grpo: equal_rewards",
     " * has_spread(rewards)[:, None]", ""),
    ("Dr. GRPO divides by the spread", "grpo_run: equals_plain and dr_grpo",
     'scale=args.loss != "dr_grpo"', "scale=True"),
    ("groups mix prompts", BY_HAND["grpo"], 'batch["rewards"].view(-1, args.group_size)',
     'batch["rewards"].view(args.group_size, -1).T.contiguous()'),
    ("all processes sample with one seed", "grpo_run: prompts_cover",
     "10**6 * (step * common.WORLD + common.RANK)", "10**6 * step"),
    ("all parts of a rollout sample with one seed", "grpo_run: prompts_cover",
     "copies, args, seed + i)", "copies, args, seed)"),
    ("prompts are not shuffled", "grpo_run: prompts_cover",
     "torch.randperm(len(examples), generator=generator) for", "torch.arange(len(examples)) for"),
    ("all processes answer the same prompts", "grpo_run: prompts_cover",
     "picked[common.RANK::common.WORLD]", "picked"),
    ("before training, training prompts are evaluated", "grpo_run: prompts_cover",
     'state["before"] = evaluate(model, scorers, held_out',
     'state["before"] = evaluate(model, scorers, examples'),
    ("after training, training prompts are evaluated", BY_HAND["grpo"],
     "tokenizer, evaluate(model, scorers, held_out",
     "tokenizer, evaluate(model, scorers, examples"),
    ("all ratios are 1", "grpo_run: ratio_is_1 and [3]",
     'micro.get("logps", logps.detach())', "logps.detach()"),
    ("the old policy is the reference", "grpo_run: ratio_is_1 and [3]",
     'batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)',
     'batch["logps"] = batch["ref_logps"]'),
    ("the old policy is that of the last update", "grpo_run: ratio_is_1 and [3]",
     "            figures.append(group_gradients(",
     '            batch["logps"] = in_parts(token_logps, model, batch, args.temperature, args)\n'
     "            figures.append(group_gradients("),
    ("the reference of an adapter is the bare base", "grpo_run: what_is_saved",
     'with common.reference(model):\n        batch["ref_logps"]',
     'with common.using(model, None):\n        batch["ref_logps"]'),
    ("the reference is scored at temperature 1", BY_HAND["grpo"],
     'batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)',
     'batch["ref_logps"] = in_parts(token_logps, model, batch, 1.0, args)'),
    ("the held-out KL is at temperature 1", BY_HAND["grpo"],
     "    logps = in_parts(token_logps, model, batch, args.temperature, args)",
     "    logps = in_parts(token_logps, model, batch, 1.0, args)"),
    ("the logged KL is that of the last update", BY_HAND["grpo"],
     "figures[0][-2:]", "figures[-1][-2:]"),
    ("the logged figures are those of the last update", BY_HAND["grpo"],
     "torch.stack(figures).mean(0)", "figures[-1]"),
    ("the entropy is per completion", BY_HAND["grpo"],
     "-logps.sum() / tokens", "-logps.sum() / sequences"),
    ("the clip fraction counts the padding", BY_HAND["grpo"],
     "(clipped * mask).sum() / tokens", "clipped.double().mean()"),
    ("zero_spread is the share of groups with spread", BY_HAND["grpo"],
     '"zero_spread": 1 - mean(spread)', '"zero_spread": mean(spread)'),
    ("group_std is that of all groups together", BY_HAND["grpo"],
     "mean(grouped.std(1))", "grouped.std().item()"),
    ("the loss is a mean over the micro-batch", BY_HAND["grpo"],
     "token_weights(mask, args.loss, sequences,", "token_weights(mask, args.loss, len(mask),"),
    ("DAPO's mean counts completions that are left out", "grpo_run: equals_plain and dapo",
     "sequences, kept_tokens, args.max", "sequences, tokens, args.max"),
    ("Dr. GRPO's constant is --max-length", "grpo_run: equals_plain and dr_grpo",
     "kept_tokens, args.max_new_tokens)", "kept_tokens, args.max_length)"),
    ("DAPO leaves out completions of the wrong groups", "grpo_run: equals_plain and dapo",
     "spread.repeat_interleave(args.group_size)", "spread.repeat(args.group_size)"),
    ("DAPO learns from truncated completions", "grpo_run: equals_plain and dapo",
     'batch["kept"] = batch["stopped"] & spread', 'batch["kept"] = spread'),
    ("no loss learns from truncated completions", BY_HAND["grpo"],
     'torch.ones_like(batch["stopped"])', 'batch["stopped"].clone()'),
    ("the two clips are exchanged", BY_HAND["grpo"],
     "args.epsilon, args.epsilon_high)", "args.epsilon_high, args.epsilon)"),
    ("CISPO's bound is 1 + ε", "grpo: cispo_bounds", "ratio.clamp(max=epsilon_high)",
     "ratio.clamp(max=1 + epsilon_high)"),
    ("CISPO's weight has a gradient", "grpo: cispo_bounds",
     "ratio.clamp(max=epsilon_high).detach()", "ratio.clamp(max=epsilon_high)"),
    ("GSPO's ratio is the product", "grpo: gspo_has_one",
     "log_ratio.sum(1, keepdim=True) / lengths(mask) * mask",
     "log_ratio.sum(1, keepdim=True) * mask"),
    ("the clip takes away the way back", "grpo: the_clip_stops",
     "-torch.min(free, bound), bound < free", "-bound, bound < free"),
    ("k3 is that of the other direction", "grpo: k3", "log_q.exp() - log_q - 1",
     "(-log_q).exp() + log_q - 1"),
    ("--beta is not used", BY_HAND["grpo"], "losses + args.beta * token_kl(", "losses + token_kl("),
    ("several rewards count alike", "grpo_run: rewards_get",
     'batch["scores"] @ torch.tensor(args.reward_weights, device=model.device)',
     'batch["scores"].sum(1)'),
    ("completions are scored with the rows of others", BY_HAND["grpo"],
     "[example for example in examples for _ in range(copies)]", "examples * copies"),
    ("the reward head reads the policy's hidden states", "grpo_run: a_reward_model_on",
     'with common.using(model, "reward"):', 'with common.using(model, "default"):'),
    ("the loss is not scaled", "grpo_run: with_a_loss_scale", "scaler.scale(loss).backward()",
     "loss.backward()"),
    ("each process has a mean of its own", "grpo_run: two_processes",
     "    sum_over_processes([tokens, kept_tokens])\n", ""),
    ("samples are drawn at temperature 1", "sampling: what_is_scored and 1.5 and qwen2",
     "(logits[:, -1].float() / args.temperature)", "logits[:, -1].float()"),
    ("positions count the padding", "sampling: what_is_scored and 1.5 and gpt2",
     "positions = (mask.cumsum(1) - 1).clamp(min=0)",
     "positions = torch.arange(mask.shape[1]).expand_as(mask)"),
    ("samples end at eos alone", "sampling: each_stop_token",
     "stops = torch.tensor(stop_ids,", "stops = torch.tensor([tokenizer.eos_token_id],"),
    ("sampling uses up the random numbers of the run", "sampling: a_sample_leaves and [True]",
     ", generator=generator)  # [alive, 1]", ")"),
    ("sampling leaves the model in training mode", "sampling: a_sample_leaves and [False]",
     "model.train(was_training)", "model.train()"),
    ("an answer has not stopped if it has the longest length", "sampling: of_the_longest_length",
     "[ids[-1] in stop_ids for ids in answers]",
     "[ids[-1] in stop_ids and len(ids) < max(map(len, answers)) for ids in answers]"),
    ("the mask begins with the last token of the prompt", "sampling: of_the_longest_length",
     "(columns >= starts)", "(columns >= starts - 1)"),
]

EVALUATE = [
    ("pass@k is the biased estimate", "evaluate: ",
     "1 - math.comb(count - hits, k) / math.comb(count, k)", "1 - (1 - hits / count) ** k"),
    ("groups mix prompts", "evaluate: ", "round(sum(right[group]))",
     "round(sum(right[j // samples::samples]))"),
    ("the interval takes samples of a prompt for independent", "evaluate: ",
     "wilson(line[column], len(examples))", "wilson(line[column], len(figures[column]))"),
    ("greedy answers are sampled", "evaluate: ", "prompts, 1, greedy, args.seed)",
     "prompts, 1, args, args.seed)"),
    ("the KL has the wrong sign", "evaluate: ",
     "(logps - first_logps).sum(1)", "(first_logps - logps).sum(1)"),
    ("the KL is at temperature 1", "evaluate: ",
     "token_logps(other, batch, args.temperature)", "token_logps(other, batch)"),
    ("the first checkpoint wears the adapter of the other", "evaluate: ",
     "common.using(model, None) if on_first else contextlib.nullcontext()",
     "contextlib.nullcontext()"),
    ("all parts are sampled with one seed", "evaluate: ",
     "prompts, samples, args, args.seed + i)", "prompts, samples, args, args.seed)"),
    ("answers without a number vote", "evaluate: search_finds",
     "[number for number in numbers if number is not None] or [None]", "numbers"),
    ("of equal votes the last said wins", "evaluate: search_finds",
     "max(said, key=said.count)", "max(said[::-1], key=said.count)"),
    ("of equal scores the last wins", "evaluate: search_finds",
     "right[scores.index(max(scores))]", "right[-1 - scores[::-1].index(max(scores))]"),
    ("best of N reads more than N samples", "evaluate: first_n_samples",
     "texts))[:count], scores[:count], right[:count]", "texts)), scores, right"),
    ("best of N picks by the truth", "evaluate: first_n_samples",
     "texts[group], scores, right[group])", "texts[group], right[group], right[group])"),
    ("a run without its adapter is taken for any first checkpoint", "evaluate: ",
     " and common.base_of(name) == common.find(first)", ""),
    ("reward models of steps are compared", "evaluate: tiny_runs_are_found",
     'not in ("reward_model", "prm")', 'not in ("reward_model",)'),
]

# the same in all five scripts, put into one of them
CHAT = [
    ("what is sampled ignores the temperature and comes from the model compared with",
     "chat: plain_forward", "torch.multinomial(logps[0].exp(), 1",
     "torch.multinomial(logits[0, -1].float().softmax(-1), 1"),
    ("the model compared with reads the newest token only", "chat: plain_forward",
     "common.causal_lm(m)(unread, past",
     "common.causal_lm(m)(unread if m is model else unread[:, -1:], past"),
    ("a stopped answer is no part of the history", "chat: ctrl_c_stops_one",
     "    if len(ids) > start:", "    if ids[-1] in stops:"),
    ("/reset forgets the system message", "chat: own_history",
     'checkpoint["history"] = system',
     'checkpoint["history"] = system if command == "/system" else []'),
    ("the log-ratio of a shown token counts for the next one, too", "chat: sum_of_its_tokens",
     "done, waiting = len(text), 0.0", "done = len(text)"),
    ("parts of characters are shown", "chat: streamed_is_the_whole",
     'if not text.endswith("\\ufffd"):', "if text:"),
]

ONLINE_DPO = [
    ("IPO's target is 1/β", "online_dpo: equation_written and ipo",
     "1 / (2 * beta)) ** 2", "1 / beta) ** 2"),
    ("the worse answer is chosen", "online_dpo: equation_written and dpo",
     "margin = lead.sign()", "margin = -lead.sign()"),
    ("XPO makes the reference's answer likelier", "online_dpo: without_optimism_is_dpo",
     "+ alpha * logps.chunk(2)[1]", "- alpha * logps.chunk(2)[1]"),
    ("XPO's optimism is about the policy's own answer", "online_dpo: without_optimism_is_dpo",
     "+ alpha * logps.chunk(2)[1]", "+ alpha * logps.chunk(2)[0]"),
    ("Nash-MD's bracket has a gradient", "online_dpo: bracket_on_y",
     "return -(lead - implicit).detach() *", "return -(lead - implicit) *"),
    ("Nash-MD's KL has the wrong sign", "online_dpo: nash_md_climbs",
     "return -(lead - implicit)", "return -(lead + implicit)"),
    ("Nash-MD leaves out equal scores", "online_dpo: nash_md_climbs",
     "return -(lead - implicit).detach() * logps.chunk(2)[0]",
     "losses = -(lead - implicit).detach() * logps.chunk(2)[0]"),
    ("equal scores are a pair", "online_dpo: equal_scores and ipo",
     "return losses * (lead != 0)", "return losses"),
    ("the mixture's weights are exchanged", "online_dpo: exactly_the_mixture and qwen2",
     "caches, (1 - m, m)", "caches, (m, 1 - m)"),
    ("both models share a cache", "online_dpo: exactly_the_mixture and qwen2",
     "caches = DynamicCache(config=causal.config), DynamicCache(config=causal.config)",
     "caches = (DynamicCache(config=causal.config),) * 2"),
    ("logits are mixed before the temperature of one of them",
     "online_dpo: exactly_the_mixture and qwen2",
     "(logits / args.temperature).log_softmax(-1)", "logits.log_softmax(-1)"),
    ("probabilities are mixed, not log-probs", "online_dpo: exactly_the_mixture and qwen2",
     "(logits / args.temperature).log_softmax(-1)  # [alive, V]\n        token = torch.multinomial("
     "mixed.softmax(-1)",
     "(logits / args.temperature).softmax(-1)  # [alive, V]\n        token = torch.multinomial("
     "mixed"),
    ("the reference samples with the adapter on", "online_dpo: reference_says",
     'common.using(model, "default"), common.reference(model)',
     'common.using(model, "default"), common.using(model, "default")'),
    ("the cache keeps answers that ended", "online_dpo: exactly_the_mixture and qwen2",
     "for cache in caches:", "for cache in caches[:1]:"),
    ("the second answer is always from π", "online_dpo: who_is_asked",
     "prompts, args.mixture, args, seed + 1)", "prompts, 0, args, seed + 1)"),
    ("both answers have one seed", "online_dpo: who_is_asked",
     "args.mixture, args, seed + 1)", "args.mixture, args, seed)"),
    ("the penalty is for answers that ended", "online_dpo: without_an_end",
     'args.missing_eos_penalty * ~batch["stopped"]', 'args.missing_eos_penalty * batch["stopped"]'),
    ("the logged reward has the penalty", "online_dpo: without_an_end",
     'penalised = batch["scores"] - args.missing_eos_penalty * ~batch["stopped"]',
     'penalised = batch["scores"].sub_(args.missing_eos_penalty * ~batch["stopped"])'),
    ("answers to different prompts are compared", "online_dpo: score_differences",
     "penalised.roll(len(prompts))", "penalised.roll(1)"),
    ("nearly equal scores are equal", "online_dpo: score_differences",
     "penalised.roll(len(prompts))).double()", "penalised.roll(len(prompts)))"),
    ("the reference reads at temperature 1", "online_dpo: equals_plain and dpo-sigmoid",
     'batch["ref_logps"] = in_parts(token_logps, model, batch, args.temperature, args)',
     'batch["ref_logps"] = in_parts(token_logps, model, batch, 1.0, args)'),
    ("micro-batches pair answers to different prompts", "online_dpo: equals_plain and ipo",
     "value[rows.flatten()]", "value[torch.cat([rows[0], rows[1].flip(0)])]"),
    ("the gradient is a mean over the micro-batch", "online_dpo: equals_plain and xpo",
     "losses.sum() / args.batch_size", "losses.mean()"),
    ("the margin counts ties", "online_dpo: equals_plain and dpo-sigmoid",
     "wins > 0.5", "wins >= 0.5"),
    ("held-out figures come from training prompts", "online_dpo: who_is_asked",
     "asked = model, scorer, held_out,", "asked = model, scorer, examples,"),
]

PAIRS = [
    ("the second order is not undone", "pairs: mean_over_both_orders",
     "won[i].append(0.5 + (forth - back) / 2)", "won[i].append((forth + back) / 2)"),
    ("verdicts that stay are counted as flips", "pairs: mean_over_both_orders",
     "(forth > 0.5) != (back < 0.5)", "(forth > 0.5) == (back < 0.5)"),
    ("the length ratio binds in one direction only", "pairs: what_a_search_finds",
     "max(lengths[i], lengths[j]) <= ratio * min(lengths[i], lengths[j])",
     "lengths[i] <= ratio * lengths[j]"),
    ("ties make pairs", "pairs: ties_give_none", "if margin > 0 else []", "if margin >= 0 else []"),
    ("answers that did not end are kept", "pairs: did_not_end",
     "if text.strip() and answer[-1] in stop_ids:", "if text.strip():"),
    ("an answer is decoded alone", "pairs: keeps_the_space",
     "tokenizer.decode(prompt + answer, **plain).removeprefix(asked)",
     "tokenizer.decode(answer, **plain)"),
    ("a reward is read before the token that ends the answer", "pairs: scores_the_last_token",
     "or [len(answer) - 1]", "or [len(answer) - 2]"),
    ("a process reward model is worth its mean line", "pairs: its_worst_line",
     ".min().item())", ".mean().item())"),
    ("the mean of a prompt is over its different answers", "pairs: above_the_mean",
     'for answer in answers for _ in range(answer["count"])]', "for answer in answers]"),
    ("what is at the mean gets a label", "pairs: above_the_mean",
     "zip(said, scores, strict=True) if score != level]", "zip(said, scores, strict=True)]"),
    ("principles do not follow the seed", "pairs: drawn_from_the_constitution",
     'f"{args.seed} {prompt} {i} {j}"', 'f"{prompt} {i} {j}"'),
    ("few comparisons leave answers out", "pairs: leave_no_answer_out",
     "duels[:max(args.comparisons, len(won) - 1)]", "duels[:args.comparisons]"),
    ("a verdict is read at the padding", "pairs: plain_forward_pass",
     'last = batch["attention_mask"].sum(-1) - 1', "last = torch.full((len(rows),), -1)"),
    ("a file is overwritten", "pairs: never_overwritten", " or output.exists()", ""),
    ("a file is there before it is whole", "pairs: whole_or_not",
     'unfinished.write_text("".join(', 'output.write_text("".join('),
    ("an old margin stays in the row", "pairs: would_be_misread", '"rejected", "margin", "label"}',
     '"rejected", "label"}'),
    ("all parts are sampled with one seed", "pairs: seed_of_its_own",
     "args.samples, args, args.seed + i)", "args.samples, args, args.seed)"),
    ("a scorer does not read the tools", "pairs: reads_the_tools",
     "(asked, _), (answer, _) = common.encode(tokenizer, prompt, said, tool)[0]",
     "(asked, _), (answer, _) = common.encode(tokenizer, prompt, said)[0]"),
    ("an answer is marked up as the template is", "pairs: speak_for_the_judge",
     "text.render(values, verdict=word).strip()",
     "jinja2.Template(text.render(values, verdict=word)).render(verdict=word).strip()"),
]

KTO = [
    ("λ_D and λ_U are swapped", "kto: its_equation",
     "torch.where(labels, desirable, undesirable)", "torch.where(labels, undesirable, desirable)"),
    ("an undesirable answer is valued without its sign", "kto: closed_form",
     "(1 - torch.sigmoid(-gains))", "(1 - torch.sigmoid(gains))"),
    ("z is scaled apart from β", "kto: its_equation",
     "gains = beta * (log_ratios - z)", "gains = beta * log_ratios - z"),
    ("z may fall below 0", "kto: mean_over_mismatched",
     "max(1, len(mismatched))).clamp(min=0)", "max(1, len(mismatched)))"),
    ("z takes the answers behind their own prompts", "kto: mean_over_mismatched",
     'example | {"prompt": other["prompt"]}', "example"),
    ("z takes the next prompt, even if it is the same", "kto: mean_over_mismatched",
     "if common.shared_length(*prompts) < min(map(len, prompts)):", "if other is not example:"),
    ("a prompt that begins with the own one is another one", "kto: token_spans",
     "< min(map(len, prompts))", "< max(map(len, prompts))"),
    ("z is that of the process alone", "kto: processes_share",
     "    sum_over_processes([scores])\n    return scores", "    return scores"),
    ("z is a mean over the micro-batch or share, not the step", "kto: processes_share",
     "log_ratios.sum() / max(1, len(mismatched))", "log_ratios[::common.WORLD].mean()"),
    ("the loss is a mean over the micro-batch", "kto: by_hand",
     "scored[0].sum() / len(examples)", "scored[0].mean()"),
    ("the reference is read with a gradient", "kto: no_gradient_flows",
     "with torch.no_grad(), common.reference(model):", "with common.reference(model):"),
    ("the reference of an adapter is the bare base", "kto: half_the_weights",
     "common.reference(model):", "common.using(model, None):"),
    ("0 and 1 are labels", "kto: must_be_a_boolean",
     'isinstance(row.get("label"), bool)', 'isinstance(row.get("label"), int)'),
    ("the labels of a pair are swapped", "kto: taken_apart",
     "(True, False), strict=True)", "(False, True), strict=True)"),
    ("a step may have one label", "kto: both_labels_in_their_share",
     "min(max(1, round(size * sum(labels) / len(labels))), size - 1)",
     "round(size * sum(labels) / len(labels))"),
    ("a label goes around again in the same order", "kto: order_of_its_own",
     "torch.randperm(len(members), generator=generator)",
     "torch.randperm(len(members), generator=generator.manual_seed(args.seed))"),
    ("the weight that would mend the balance is inverted", "kto: a_line_says",
     "args.desirable_weight / ratio * 7 / 6", "args.desirable_weight * ratio * 7 / 6"),
    ("held-out answers of one label are not refused", "kto: one_label_only and held_out",
     '("to train on", examples), ("held out", held_out)', '("to train on", examples),'),
    ("an answer behind another prompt is not shortened", "kto: shortened_as_everything",
     'return shorten(tokens, len(tokens["input_ids"]), len(example["prompt"]), longest)',
     "return tokens"),
    ("what is longer than the model can read is read", "kto: shortened_as_everything",
     "longest = min(args.max_length, tokenizer.model_max_length)", "longest = args.max_length"),
    ("rewards are logged without β", "kto: by_hand",
     '"chosen_reward": args.beta * chosen', '"chosen_reward": chosen'),
    ("evaluation takes z of the training step as 0", "kto: by_hand",
     "    z = reference_point(model, examples, args, tokenizer)\n    scores",
     "    z = torch.zeros(())\n    scores"),
    ("evaluation leaves the model in evaluation mode", "kto: run_with_evaluations",
     "    model.train()\n    return describe(scores, examples, z, args)",
     "    return describe(scores, examples, z, args)"),
    ("the figures of a step are logged of the training data's first examples", "kto: by_hand",
     '{"step": step} | describe(scores, batch, z, args)',
     '{"step": step} | describe(scores, examples[:len(batch)], z, args)'),
]

PRM = [
    ("a step is read one token early", "prm: padding_changes",
     'batch["step_ends"]]  # [B, S, D]', 'batch["step_ends"] - 1]  # [B, S, D]'),
    ("a step ends one token early", "prm: every_template and chatml",
     "ends.append(low)", "ends.append(low - 1)"),
    ("every step is searched from the start of the answer", "prm: repeat_or_contain",
     "text.find(step, done)", "text.find(step)"),
    ("special tokens are part of the text in which lines are searched",
     "prm: lines_that_were_sampled and tiny",
     '{"skip_special_tokens": True,', '{"skip_special_tokens": False,'),
    ("ends are counted from the start of the answer", "prm: every_template and chatml",
     "[len(asked) + end for end in", "[end for end in"),
    ("autocast rounds the head", "prm: head_is_not_rounded",
     "(hidden.float() * head.weight.float()).sum(-1)  # [B, S]", "hidden @ head.weight[0]"),
    ("the labels are the wrong way round", "prm: log_likelihood_of",
     "labels * right + (1 - labels) * wrong", "labels * wrong + (1 - labels) * right"),
    ("steps that are padding are trained", "prm: passes_gradcheck",
     "(1 - labels) * wrong) * loss_mask", "(1 - labels) * wrong)"),
    ("the loss is the mean over solutions, not steps", "sft_reward_loop: loop_equals and [3-prm]",
     "scaler.scale(loss / trained)", "scaler.scale(loss / len(batch))"),
    ("each process divides by the steps of its own share",
     "sft_reward_loop: two_processes_equal and prm",
     "for example in batch)\n        mine", "for example in batch[common.RANK::common.WORLD])\n"
     "        mine"),
    ("--outcome learns from the first step", "prm: example_is_prompt",
     "[0] * (len(steps) - 1) + [1] if", "[1] + [0] * (len(steps) - 1) if"),
    ("padding counts as steps that are suspected", "prm: figures_are_what",
     "judged = (logits >= 0) | ~steps", "judged = logits >= 0"),
    ("any suspicion in a wrong solution is a hit", "prm: hit_is_the_first",
     "flagged & wrong & same_place,", "flagged & wrong,"),
    ("the last wrong step is looked for", "prm: hit_is_the_first",
     "judged.long().cumprod(-1).sum(-1)", "judged.long().sum(-1)"),
    ("padding is a factor of the product", "prm: figures_are_what",
     "(F.logsigmoid(logits.double()) * steps)", "F.logsigmoid(logits.double())"),
    ("precision and recall are the wrong way round", "prm: hit_is_the_first",
     '"precision": n["hits"] / max(1, n["flagged"]), "recall": n["hits"] / max(1, n["wrong"])',
     '"precision": n["hits"] / max(1, n["wrong"]), "recall": n["hits"] / max(1, n["flagged"])'),
    ("a text prompt is plain text, template or not", "prm: text_prompt_is_a_question",
     "isinstance(prompt, str) and tokenizer.chat_template:", "not prompt:"),
    ("numbers pass for labels", "prm: cannot_be_used",
     "list(map(type, labels)) != [bool] * len(steps)", "len(labels) != len(steps)"),
    ("blanks around a step are part of it", "prm: blanks_around",
     "steps = [step.strip() for step in steps]", "steps = list(steps)"),
]

HOUSEKEEPING = [
    ("dpo", "gradients are clipped before they are unscaled", "dpo: with_a_loss_scale",
     "    scaler.unscale_(optimizer)\n", ""),
    ("sft", "gradients add up over the steps", BY_HAND["sft"], "    optimizer.zero_grad()\n", ""),
    ("sft", "a step has the rate of the one before", BY_HAND["sft"],
     '    optimizer.param_groups[0]["lr"] = rate\n    scaler.step(optimizer)\n',
     '    scaler.step(optimizer)\n    optimizer.param_groups[0]["lr"] = rate\n'),
    ("dpo", "gradients are hardly clipped", BY_HAND["dpo"],
     "clip_grad_norm_(weights, 1.0)", "clip_grad_norm_(weights, 10.0)"),
    ("reward_model", "each process follows its own gradient",
     "sft_reward_loop: two_proc and [reward_model]",
     "    sum_over_processes([weight.grad for weight in weights])\n", ""),
    ("sft", "the last step is at rate 0", BY_HAND["sft"],
     "math.cos(math.pi * (step - 1) / steps)",
     "math.cos(math.pi * (step - 1) / max(1, steps - 1))"),
    ("dpo", "an overflow ends a run that has a loss scale", "dpo: an_overflow_skips",
     "if not math.isfinite(norm) and scaler.get_scale() <= 1:", "if not math.isfinite(norm):"),
    ("reward_model", "a gradient that is not finite is no error",
     "sft_reward_loop: without_a_scale and [reward_model]",
     "if not math.isfinite(norm) and scaler.get_scale() <= 1:", "if norm < 0:"),
    ("dpo", "the loss scale is not saved", "dpo: an_overflow_skips",
     '"optimizer": optimizer, "scaler": scaler}', '"optimizer": optimizer}'),
    ("dpo", "the optimizer is not saved", "dpo: an_overflow_skips",
     '"optimizer": optimizer, "scaler": scaler}', '"scaler": scaler}'),
    ("dpo", "two commands may share a folder", "runs: a_folder_of_another and [dpo]",
     "open_run.lock.acquire(blocking=False)", "pass"),
    ("reward_model", "a run goes on with other flags",
     "runs: a_folder_of_another and [reward_model]",
     "or file.read_text() != text:", "or not file.read_text():"),
    ("sft", "a run goes on with other data", "runs: a_folder_of_another and [sft]",
     "json.dumps(examples, default=str)", "json.dumps([len(part) for part in examples])"),
    ("dpo", "a killed run leaves half a file", "runs: goes_on_wherever and [dpo]",
     '    file.with_suffix(".new").write_text(text)\n    file.with_suffix(".new").replace(file)\n',
     "    file.write_text(text)\n"),
    ("reward_model", "a killed run leaves half a state",
     "runs: goes_on_wherever and [reward_model]",
     'torch.save(state | states, Path(args.output_dir, "resume.new"))\n'
     '        Path(args.output_dir, "resume.new").replace(Path(args.output_dir, "resume.pt"))',
     'torch.save(state | states, Path(args.output_dir, "resume.pt"))'),
    ("dpo", "a finished run keeps its state", "runs: leaves_one_adapter and [dpo]",
     '        Path(args.output_dir, "resume.pt").unlink(missing_ok=True)\n', ""),
    ("sft", "all processes write the metrics", "runs: two_processes_equal_one and [sft]",
     '    if common.RANK == 0:\n        lines', '    if common.RANK >= 0:\n        lines'),
    ("dpo", "the weights of the first process are not sent",
     "runs: two_processes_equal_one and [dpo]",
     "        dist.broadcast(weight.data, 0)\n", "        pass\n"),
]

OTHERS = [
    ("plot.py", "a gap is drawn as a point", "form: plot_draws",
     "if step.get(name) is not None]", "if name in step]"),
    ("plot.py", "a picture is overwritten", "form: plot_overwrites",
     "if output.exists():", "if not output.name:"),
    ("plot.py", "a unit is missing", "form: plot_draws",
     'UNITS.get(name.removeprefix("eval_"), name', "UNITS.get(name + name, name"),
    ("examples/rewards.py", "a long text pays a penalty without end", "form: shortness_falls",
     "1 - min(1.0, len(text) / 1000)", "1 - len(text) / 1000"),
    ("examples/rewards.py", "a classifier does not see the prompt", "form: a_foreign_classifier",
     'chat = [*prompt, {"role": "assistant", "content": text}]',
     'chat = [{"role": "assistant", "content": text}]'),
]

# what no test can catch, and why that is no loss
EQUIVALENT = {
    "checkpoints are reentrant, which needs inputs with gradients":
        "transformers then makes the embeddings ask for gradients, and both ways agree: the other "
        "way is the one that torch recommends",
    "the weights of the first process are not sent":
        "the seed and the saved state are the same for all processes, so that their weights are; "
        "sending them guards against machines that draw other numbers"}

MISTAKES = [(file, *mistake) for file, table in (
    ("common.py", COMMON), ("sft.py", SFT), ("reward_model.py", REWARD_MODEL), ("dpo.py", DPO),
    ("ppo.py", PPO), ("grpo.py", GRPO), ("evaluate.py", EVALUATE),
    ("prm.py", PRM), ("kto.py", KTO), ("online_dpo.py", ONLINE_DPO), ("pairs.py", PAIRS),
    ("chat.py", CHAT),
) for mistake in table]
MISTAKES += [(f"{script}.py", *mistake) for script, *mistake in HOUSEKEEPING]
MISTAKES += OTHERS


def run_tests(folder, name, expression, limit=LIMIT):
    """Runs tests of the copy in a process of their own: "passed", "failed" or what else it was."""
    log = folder / "log.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.alarm(limit)
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.dont_write_bytecode = True
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
        flags = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
        os._exit(pytest.main([*flags, "-k", expression, f"tests/test_{name}.py"]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.killpg(child, signal.SIGKILL)  # what the tests left running
    except ProcessLookupError:
        pass
    if code == -signal.SIGALRM:
        return "hangs"
    if code == 0 and " passed" not in log.read_text(errors="replace"):
        return "skipped"
    return {0: "passed", 1: "failed"}.get(code, f"no such tests, exit code {code}")


def check_unchanged(folder, mistakes):
    """The tests named must pass without any mistake, or that they fail with one says nothing."""
    expressions = {}
    for _, _, tests, _, _ in mistakes:
        name, _, expression = tests.partition(": ")
        expressions.setdefault(name, {})[f"({expression})" if expression else ""] = None
    good = True
    for name, parts in expressions.items():
        began = time.time()
        expression = "" if "" in parts else " or ".join(parts)
        result = run_tests(folder, name, expression, 3600)
        print(f"unchanged  tests/test_{name}.py {result}, {time.time() - began:.0f} s", flush=True)
        if result != "passed":
            good = False
            print((folder / "log.txt").read_text(errors="replace")[-1500:])
    return good


def main():
    torch.set_num_threads(1)
    numbers = [int(text) for text in sys.argv[1:]] or range(1, len(MISTAKES) + 1)
    chosen = [(number, MISTAKES[number - 1]) for number in numbers]
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "copy")
        folder.mkdir()
        Path(place, "shared").symlink_to(ROOT.parent / "shared")  # which some tests need
        for path in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
            shutil.copy(path, folder)
        for part in "tests", "tiny", "examples":
            shutil.copytree(ROOT / part, folder / part,
                            ignore=shutil.ignore_patterns("__pycache__"))
        good = check_unchanged(folder, [mistake for _, mistake in chosen])
        for number, (file, words, tests, old, new) in chosen:
            began = time.time()
            result = "DOES NOT APPLY"
            text = (folder / file).read_text()
            if text.count(old) == 1 and text.replace(old, new) != text:
                (folder / file).write_text(text.replace(old, new))
                name, _, expression = tests.partition(": ")
                result = run_tests(folder, name, expression)
                result = {"failed": "killed", "passed": "SURVIVED"}.get(result, result)
                (folder / file).write_text(text)
            if result not in ("killed", "hangs"):
                survivors.append((number, words, result))
            seconds = time.time() - began
            print(f"{number:>3}  {file:<20} {result:<9} {seconds:4.0f} s  {words}", flush=True)
    unexplained = [words for _, words, _ in survivors if words not in EQUIVALENT]
    for number, words, result in survivors:
        print(f"\n{number}, {words}: {result}\n    {EQUIVALENT.get(words, 'UNEXPLAINED')}")
    print(f"\n{len(chosen)} mistakes, {len(chosen) - len(survivors)} caught, "
          f"{len(survivors)} not, of them {len(unexplained)} without a reason")
    sys.exit(1 if unexplained or not good else 0)


if __name__ == "__main__":
    main()
