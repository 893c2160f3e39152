"""What every script shares: loading models and rows, and turning rows into token ids.

A model is a Hub name, a folder or a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) on a frozen
base, in 4 bits on a GPU (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). A row becomes pieces,
(ids, is_answer), of which the scripts make examples. One that is of no use raises ValueError.
"""
# ruff: noqa: E402
import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path

for chatty in "bitsandbytes", "huggingface_hub":  # they advertise a kernel and report every retry
    logging.getLogger(chatty).setLevel(logging.CRITICAL)

import bitsandbytes
import datasets
import huggingface_hub
import jinja2
import peft
import pyarrow.parquet
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.integrations import sdpa_attention
from transformers.modeling_outputs import CausalLMOutputWithPast as ModelOutput

# Since transformers 5.24, models call their cache `cache`.
CACHE = "cache" if "cache" in ModelOutput.__dataclass_fields__ else "past_key_values"
HERE = Path(__file__).resolve().parent
SCORE = "base_model.model.score.weight"  # a reward model's head in the file of its adapter
QUOTE, MARK = "\ufdd0", "\ufdd1"  # code points that no text has
FORMATS = (".json", ".jsonl", ".csv", ".tsv")
# other names of roles whose meaning is certain, and keys of a message that are not for templates
ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"}
NOT_FOR_TEMPLATES = ("from", "value", "weight", "train", "tool_calls")
# the usual names of columns, of which the first that a row has is read, and others of a chat
QUESTIONS = ("prompt", "instruction", "question", "problem", "query", "input")
ANSWERS = ("completion", "output", "response", "solution", "answer")
SPOKEN = {*QUESTIONS, *ANSWERS, "system", "system_prompt", "context", "messages", "conversations",
          "history", "text", "chosen", "rejected", "completions", "labels"}
ANOTHER_BASE = "on another base: REWARD_MODEL=NAME, --reward examples/rewards.py:classifier"
USER_FILES = set()  # files with reward functions: an error shows the line of theirs
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model")
RANK = int(os.environ.get("RANK", 0))  # torchrun starts WORLD processes and gives each its RANK
WORLD = int(os.environ.get("WORLD_SIZE", 1))
ON_GPU = {"choices": ["on", "off"], "default": "on" if torch.cuda.is_available() else "off"}

transformers.logging.set_verbosity_error()
# no bars for what is read from this disk: that takes seconds. Downloads show theirs
transformers.logging.disable_progress_bar()
if RANK == 0 and not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:  # or it warns
    huggingface_hub.utils.enable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it also raises
datasets.disable_progress_bars()


# ---- errors and flags ----------------------------------------------------------------------------

def visible(text: str) -> str:
    """Text from data with its control characters spelled out: it cannot move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def fail(message: str):
    """Ends the program over something that the user can mend: one line on stderr, exit code 2.

    With TRACEBACK=1 in the environment, the traceback of what went wrong stands above the line.
    """
    # where all fail alike, the first speaks, and torchrun ends the rest
    time.sleep(3 if RANK > 0 else 0)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the line is not glued to it
    if os.environ.get("TRACEBACK") == "1" and sys.exc_info()[0]:
        sys.excepthook(*sys.exc_info())
    print(f"error: {visible(' '.join(message.split())):.500}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def phase(doing: str):
    """Whatever goes wrong inside becomes one line: libraries and users raise types of their own."""
    try:
        yield
    except (torch.OutOfMemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [x for x in frames if x.filename in USER_FILES]
        place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}: " if own else ""
        # `datasets` says only that "an error occurred"; an error may also be its own cause
        for _ in range(9):
            error = error.__cause__ or error
        fail(f"{doing}: {place}{type(error).__name__}: {str(error) or 'no reason given'}")


RESUMES = "; the same command resumes an interrupted run"
ADVICE = {"KeyboardInterrupt": "interrupted{resumes}",
          "BrokenPipe": "nobody reads the output any more{resumes}",
          "MemoryError|allocate memory|out of memory|ALLOC_FAILED": "out of memory: lower {flags}",
          # torch does not say why it could not write
          "No space left|[Dd]isk quota|inline_container": "the disk is full{resumes}"}


@contextlib.contextmanager
def running(memory_flags: str, resumes: str = RESUMES):
    """Around a whole run: its processes find each other, and what a user can mend is one line.

    `resumes` ends the lines of an interruption; it is "" for a program that cannot be resumed.
    """
    # a closed stream is None, and the next file to be opened would get its number
    sys.stdin = sys.stdin or open(os.devnull)
    if RANK > 0 or not sys.stdout:
        sys.stdout = open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    if WORLD > 1:
        dist.init_process_group("nccl" if choose_device().type == "cuda" else "gloo")
    try:
        yield
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again at its end
        for sign, advice in ADVICE.items():
            if re.search(sign, f"{type(error).__name__}: {error}"):
                fail(advice.format(flags=memory_flags, resumes=resumes))
        raise
    if WORLD > 1:
        dist.destroy_process_group()


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type that refuses what is out of range, NaN included."""
    def within(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} and {high:g}")
        return kind(text)

    within.__name__ = kind.__name__  # for argparse's message
    return within


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 1e-9)
weight = number(float, 0)
share = number(float, 0, 1)


def column(text: str) -> str:
    """An argparse type: prompt=query, where the prompt stands in a column of another name."""
    if not re.fullmatch("[^=]+=[^=]+", text):
        raise argparse.ArgumentTypeError(f"{text} is not like prompt=query")
    return text


def variables(text: str) -> dict:
    """An argparse type: a JSON object, for variables of a chat template."""
    values = json.loads(text)
    if not isinstance(values, dict) or not all(key.isidentifier() for key in values):
        raise argparse.ArgumentTypeError('it must be like {"enable_thinking": false}')
    return values


LORA_RANK = {"default": 16, "help": "rank of new LoRA matrices, which are on all linear layers and "
             "have an alpha of twice the rank; an adapter keeps its own rank"}
COLUMNS = {"type": column, "nargs": "+", "default": [], "metavar": "NAME=COLUMN"}
VARIABLES = {"type": variables, "metavar": '{"enable_thinking": false}'}


def parse(flags: argparse.ArgumentParser, tiny: dict, by_loss: dict | None = None):
    """The flags; the tiny model and each --loss may need other defaults than the rest."""
    flags = copy.deepcopy(flags)  # its defaults change below; those of the next run must not
    flags.error = fail
    args = flags.parse_args()
    flags.set_defaults(**by_loss[args.loss] if by_loss and args.loss in by_loss else {})
    if is_tiny(args.model):
        flags.set_defaults(**tiny)
        if flags.parse_args().dataset != tiny["dataset"]:
            flags.set_defaults(eval_dataset=None)  # the tiny world's held-out rows go with its own
    if getattr(args, "lora_rank", None) == 0:  # all weights together take smaller steps
        flags.set_defaults(learning_rate=flags.get_default("learning_rate") / 10)
    args = flags.parse_args()
    with phase(f"--output-dir {args.output_dir}"):
        # the tokenizer, which is saved last, takes no other names
        if not args.output_dir.encode() or Path(args.output_dir, "summary.json").exists():
            raise ValueError("it is empty or holds a finished run: name another folder")
    return args


# ---- models --------------------------------------------------------------------------------------

def choose_device() -> torch.device:
    """The GPU of this process (torchrun sets LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # bitsandbytes and nccl use it
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU; bf16 from compute capability 8.0 on, which a T4 only emulates; else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(model):
    """The number format of the forward passes; what is trained stays in fp32."""
    kind = model.device.type
    return torch.autocast(kind, choose_dtype(model.device), enabled=kind == "cuda")


def grad_scaler(model):
    """For fp16, in which small gradients round to 0. With bf16 and fp32 it does nothing."""
    fp16 = choose_dtype(model.device) == torch.float16
    scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
    scaler.scale(torch.zeros((), device=model.device))  # its scale is made at first use
    return scaler


def find(name: str) -> str:
    """`name`, or what has that name beside this file: tiny/chat is found from any folder."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def adapter_config(name: str) -> peft.PeftConfig | None:
    """The config of a LoRA adapter, or None for a full model."""
    is_adapter = transformers.utils.peft_utils.find_adapter_config_file(find(name))
    config = peft.PeftConfig.from_pretrained(find(name)) if is_adapter else None
    if config and config.peft_type != "LORA":
        raise ValueError(f"its adapter is of the kind {config.peft_type}: only LoRA is supported")
    return config


def base_of(name: str) -> str:
    """Where the full model of `name` is: itself, or the base of an adapter."""
    adapter = adapter_config(name)
    return find(adapter.base_model_name_or_path if adapter else name)


def fingerprint(*names: str) -> str:
    """A hash of what models and FILE.py:function are made of.

    Of a file above 256 MiB it takes 4 KiB of every MiB: training changes nearly all weights of a
    matrix, and a model of 15 GB then takes 15,000 short reads.
    """
    digest = hashlib.sha256()
    for name in [*names, base_of(names[0])]:
        path = Path(find(re.sub(r"\.py:.*", ".py", name)))
        files = [path] if path.is_file() else sorted(path.glob("*"))
        for file in files:
            if file.is_file() and file.suffix in (".py", *MODEL_FILES):
                with phase(f"reading {file}"), file.open("rb") as opened:
                    size = file.stat().st_size
                    digest.update(f"{file.name} {size} ".encode())
                    block = 2**20 if size <= 2**28 else 2**12
                    for place in [*range(0, size, 2**20), max(0, size - block)]:
                        opened.seek(place)
                        digest.update(opened.read(block))
        for config in ("config.json", "adapter_config.json") if not path.exists() else ():
            # of a model of the Hub, the cache has each commit in a folder of that name
            cached = huggingface_hub.try_to_load_from_cache(name, config)
            digest.update(Path(cached).parent.name.encode() if isinstance(cached, str) else b"")
    return digest.hexdigest()


def is_tiny(name: str) -> bool:
    """True for the embedded models and what was trained from them."""
    with phase(f"loading the model {name}"):
        base = Path(base_of(name))
        if (base / "summary.json").exists():  # of a run that trained all weights
            base = Path(find(json.loads((base / "summary.json").read_text()).get("model", name)))
        return base.is_dir() and base.resolve().is_relative_to(HERE / "tiny")


def patch_libraries(device: torch.device):
    """Changes to the behavior of libraries, each with its reason and the version that needs it."""
    # bitsandbytes 0.48: on a CPU with AVX512-BF16, a forward pass in evaluation mode repacks 4-bit
    # weights, and the next training step fails.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    # transformers 5.0: it calls its own deprecated method when gradient checkpointing is turned on.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # peft 0.17: it only warns where the file of an adapter lacks weights, which would stay random.
    warnings.filterwarnings("error", "Found missing adapter keys")
    if choose_dtype(device) == torch.float16:
        # transformers 5.0: it sets enable_gqa, which before Ampere sends SDPA to its slow math
        # kernel. Without it, transformers repeats the keys itself.
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def load_config(name: str):
    """The config of the base of `name`, with every kind of dropout turned off.

    Policy, reference and sampler must agree on a log-prob. OPT calls dropout as a function, and
    Mistral's attention has its own, so that no module could be switched off later.
    """
    config = transformers.AutoConfig.from_pretrained(base_of(name), trust_remote_code=False)
    for part in [config, *vars(config).values()]:
        if isinstance(part, transformers.PreTrainedConfig):
            for key, value in list(vars(part).items()):
                if re.search("drop|jitter", key) and isinstance(value, float):
                    setattr(part, key, 0.0)
    return config


def load_model(name: str, load_in_4bit: str = ON_GPU["default"], lora_rank: int = 16,
               gradient_checkpointing: str = ON_GPU["default"], trainable: bool = True,
               task: str = "CAUSAL_LM", keep_reference: bool = True):
    """Loads a model with a LoRA adapter "default" to train, in fp32; all else is frozen.

    If `name` is an adapter, training goes on with its matrices, and a frozen copy of them stays as
    "reference", unless nobody asks for it. `lora_rank` 0 trains all weights, never in 4 bits;
    `trainable=False` none. The task SEQ_CLS gives a reward model: a scalar head `score`, trained
    and saved with the adapter.
    """
    device = choose_device()
    full = trainable and lora_rank == 0
    dtype = torch.float32 if full else choose_dtype(device)  # Adam's steps would round to nothing
    quantise = load_in_4bit == "on" and not full
    if is_tiny(name):
        torch.set_num_threads(1)  # on matrices this small, threads only wait for each other
    patch_libraries(device)
    with phase(f"loading the model {name}"):
        adapter = adapter_config(name)
        if full and adapter:
            raise ValueError("--lora-rank 0 cannot go on from an adapter")
        if adapter and adapter.task_type != task and (task == "CAUSAL_LM" or not trainable):
            raise ValueError(f"an adapter for {adapter.task_type}, needed is one for {task}")
        config, kind = load_config(name), transformers.AutoModelForCausalLM
        scorers = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if task == "SEQ_CLS" and type(config) in scorers:
            kind, config.num_labels = transformers.AutoModelForSequenceClassification, 1
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
        # None: transformers takes sdpa, or eager for a class that has nothing else. On Qwen, eager
        # attention overflows in fp16.
        attention = "sdpa" if config.model_type.startswith("qwen") else None
        model = kind.from_pretrained(
            base_of(name), config=config, dtype=dtype, device_map={"": device},
            quantization_config=nf4 if quantise else None, attn_implementation=attention,
            trust_remote_code=False)
        if task == "SEQ_CLS" and not hasattr(model, "score"):
            # a family without such a class gets a scalar head beside that of its language model
            width = config.get_text_config().hidden_size
            model.score = torch.nn.Linear(width, 1, bias=False, device=device, dtype=dtype)
        if choose_dtype(device) == torch.float16 and "gemma3" <= config.model_type < "gemma5":
            print(f"{config.model_type} overflows in fp16, in which this GPU computes: take a GPU "
                  "that has bf16 (from Ampere on), or another model")
        # by hand: peft's prepare_model_for_kbit_training turns embeddings into fp32, 2 GiB at 7B
        model.requires_grad_(full)
        if adapter and adapter.task_type == task:
            model = peft.PeftModel.from_pretrained(model, find(name), is_trainable=trainable)
            if trainable and task == "CAUSAL_LM" and keep_reference:
                model.load_adapter(find(name), "reference", is_trainable=False)
        elif trainable and not full:
            model = add_lora(model, name if adapter else None, lora_rank, task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # of an adapter that was trained with dropout
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the GradScaler refuses fp16 gradients
        if gradient_checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        check_forward(model, task)
    return model.train(trainable)


def add_lora(model, adapter_name: str | None, rank: int, task: str):
    """New LoRA matrices on all linear layers but the head; a reward model may take an LM's."""
    new = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_layers(model))
    config = adapter_config(adapter_name) if adapter_name else new
    config.task_type = task
    config.inference_mode = False
    config.modules_to_save = ["score"] if task == "SEQ_CLS" else None
    model = peft.get_peft_model(model, config)
    if adapter_name:
        score = model.get_base_model().score.modules_to_save["default"].weight
        load_weights(model, adapter_name, "default", {SCORE: score})
    return model


@torch.no_grad()
def linear_layers(model) -> list[str]:
    """The names of the linear layers that text passes through on its way to the hidden states.

    A trial run finds them, so that no matrix is created that would never be used. The head, vision
    towers and layers whose weight is read by others are not called; a router that returns several
    tensors is no layer that LoRA can add to. In training mode, because Gemma 3n calls one layer in
    evaluation only. Mamba's out_proj is called on a CPU, but a GPU's kernel reads its weight.
    """
    outputs = {}
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: outputs.update({module: output}))
    with autocast(model):
        model.train().base_model(input_ids=torch.tensor([[1, 2, 3]], device=model.device))
    hook.remove()
    linear = torch.nn.Linear | transformers.pytorch_utils.Conv1D
    return [name for name, module in model.named_modules()
            if isinstance(module, linear) and torch.is_tensor(outputs.get(module))
            and not name.endswith(("mamba.out_proj", "mixer.out_proj"))]


def load_weights(model, name: str, role: str, head: dict | None = None) -> dict:
    """Fills the adapter `role` from the file of `name`; what the file lacks peft leaves random."""
    weights = peft.load_peft_weights(find(name), device="cpu") | (head or {})
    missing = peft.set_peft_model_state_dict(model, weights, adapter_name=role).missing_keys
    if any(f".{role}." in key for key in missing):
        raise ValueError("its file does not hold the weights that its config names")
    check_weights(model)
    return weights


def causal_lm(model):
    """The model without peft's wrapper, LoRA layers inside: `.base_model` is all but its head."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def check_weights(model):
    """Refuses weights that are no finite numbers: a sum is finite where all are, with no copy."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if not all(p.sum(dtype=torch.float32).isfinite() for p in weights):
        raise ValueError("its weights are not finite numbers")


def read(causal, ids, mask, cache=None):
    """Logits [B, V] behind the last of the tokens `ids` [B, T], and the cache for the next call.

    The mask is 1 on all real tokens so far, those in the cache and those of `ids`. The model makes
    a cache of the kind that it needs. Its rows are repeated, or dropped, by `reorder_cache`.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # [B, T]
    out = causal(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                 logits_to_keep=1, **{CACHE: cache})
    if out.get(CACHE) is None:
        raise ValueError(f"{type(causal).__name__} returns no cache to continue from")
    return out.logits[:, -1], out[CACHE]


def read_out(causal, hidden):
    """Logits [..., V] of a base's hidden states [..., D]: the head, and what some do behind it."""
    config = causal.config.get_text_config()
    logits = causal.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale:  # Cohere, Falcon-H1
        logits = logits * scale
    if divisor:  # Granite, MiniCPM3
        logits = logits / divisor
    if cap:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def check_equal(model, found, expected, complaint: str):
    """Refuses the model unless both are the same, up to the rounding of its number format."""
    limit = 0.001 if choose_dtype(model.device) == torch.float32 else 0.1
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    if not error <= limit:
        raise ValueError(f"{type(model).__name__} {complaint} (error {error:.2g})")


@torch.no_grad()
def check_forward(model, task: str):
    """Refuses broken weights, and a model that scripts would train or sample wrongly.

    Two rows of 6 and 4 tokens are read as training and sampling read them, beside each other and
    padded, and compared with each row alone.
    """
    check_weights(model)
    causal = causal_lm(model).eval()
    ids = torch.tensor([[1, 2, 3, 2, 1, 3], [3, 2, 1, 3, 0, 0]], device=causal.device)
    rows = [ids[:1], ids[1:, :4]]
    with autocast(causal):
        alone = [causal.base_model(input_ids=row, use_cache=False)[0][0] for row in rows]
        alone = torch.cat(alone)  # [6 + 4, D]
        if not alone.isfinite().all():
            raise ValueError("its hidden states are not finite numbers")
        # Training pads on the right. Dropout that is still on would show, too.
        mask = (ids > 0).long()
        hidden = causal.train().base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        check_equal(causal.eval(), hidden[mask > 0], alone, "reads rows otherwise in training")
        if task == "SEQ_CLS":
            return
        # The logits are made large, or a bound on them would not show.
        head = causal.get_output_embeddings()
        scale = 100 / head(alone).abs().max()
        hook = head.register_forward_hook(lambda *call: call[2] * scale)
        logits = [causal(input_ids=row, use_cache=False).logits[0] for row in rows]
        logits = torch.cat(logits)  # [6 + 4, V]
        check_equal(causal, read_out(causal, alone), logits, "changes its logits after the head")
        # Sampling pads on the left, and continues from a cache whose rows have been reordered.
        left = torch.stack([ids[0], ids[1].roll(2)])
        first, cache = read(causal, left[:, :4], (left > 0)[:, :4].long())
        cache.reorder_cache(torch.tensor([1, 0], device=causal.device))
        left = left.flip(0)
        for length in 5, 6:
            mask = (left > 0)[:, :length].long()
            last, cache = read(causal, left[:, length - 1:length], mask, cache)
        found, expected = torch.cat([first, last]), logits[[3, 7, 9, 5]]
        check_equal(causal, found, expected, "does not continue from its cache")
        hook.remove()


@contextlib.contextmanager
def using(model, role: str | None):
    """Inside, `model` wears the adapter `role`, or with None it is the bare base."""
    outer = model.active_adapter
    trained = [(p, p.requires_grad) for p in model.parameters()]  # peft changes them on the way
    with contextlib.nullcontext() if role else model.disable_adapter():
        if role:
            model.set_adapter(role)
        yield
    model.set_adapter(outer)
    for p, is_trained in trained:
        p.requires_grad_(is_trained)


def reference(model):
    """Inside, `model` is what training started from: the base, or a frozen copy of its adapter."""
    return using(model, "reference" if "reference" in model.peft_config else None)


def reward_config(name: str, policy: str) -> peft.PeftConfig:
    """The config of a reward model that reward_model.py saved on the base of `policy`."""
    with phase(f"loading the reward model {name} ({ANOTHER_BASE})"):
        config = adapter_config(name)
        if not config or config.task_type != "SEQ_CLS":
            raise ValueError("it was not saved by reward_model.py")
        summary = Path(find(name), "summary.json")  # tiny/reward has none
        if summary.exists() and re.search(r'"method"\s*:\s*"prm"', summary.read_text()):
            raise ValueError("prm.py saved it; only pairs.py and evaluate.py read scores of steps")
        base, wanted = base_of(name), base_of(policy)
        if Path(base).resolve() != Path(wanted).resolve():
            raise ValueError(f"one base has to carry both: its is {base}, the policy's {wanted}")
        config.task_type = "CAUSAL_LM"  # its head is no part of the model that carries it
        config.modules_to_save = None
    return config


@functools.cache
def load_function(name: str):
    """A user's FILE.py:function, which may import what lies beside its file."""
    file, _, function = name.rpartition(":")
    with phase(f"loading the reward {name}"):
        path = str(Path(find(file)).resolve())
        USER_FILES.add(path)
        # At the end: a folder `datasets` beside the file must not hide the library of that name.
        sys.path.append(os.path.dirname(path))
        loaded = runpy.run_path(path)[function]
        # Of an object that is no function, its class says how it is called.
        forms = loaded, vars(type(loaded)).get("__call__")
        is_async = [inspect.iscoroutinefunction(x) or inspect.isasyncgenfunction(x) for x in forms]
        if not callable(loaded) or any(is_async):
            raise ValueError("a reward must be a plain function, not async and not a value")
    return loaded


def add_role(model, name: str | None, role: str, trainable: bool = False) -> torch.nn.Linear:
    """Puts on `model` the adapter of the reward model `name`, or a new one; returns its head."""
    own = model.peft_config["default"]
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    config = peft.LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules)
    score = torch.zeros(1, causal_lm(model).config.get_text_config().hidden_size)
    if name:
        config = reward_config(name, own.base_model_name_or_path)
    with phase(f"loading the reward model {name} for the {role}"):
        model.add_adapter(role, config)
        if name:
            score = load_weights(model, name, role)[SCORE]
    for key, p in model.named_parameters():
        p.requires_grad_(trained.get(key, trainable))
    head = torch.nn.Linear(score.shape[1], 1, bias=False, device=model.device)
    head.weight.data.copy_(score)
    return head.requires_grad_(trainable)


def save_model(model, tokenizer, folder: Path):
    """The trained adapter, or all weights if they were trained, and the tokenizer."""
    options = {"selected_adapters": ["default"], "save_embedding_layers": False}
    model.save_pretrained(folder, **options if isinstance(model, peft.PeftModel) else {})
    tokenizer.save_pretrained(folder)


def settings(model) -> dict:
    """What was chosen for this model on this machine."""
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    # two weights share a byte; the experts of a mixture are not linear layers and stay in 16 bits
    in_4bit = sum(2 * p.numel() for p in frozen if p.dtype == torch.uint8)
    others = sum(p.numel() for p in frozen if p.dtype != torch.uint8)
    return {"device": str(model.device), "dtype": str(choose_dtype(model.device)),
            "load_in_4bit": bool(getattr(causal_lm(model), "is_loaded_in_4bit", False)),
            "share_in_4bit": round(in_4bit / (in_4bit + others), 2),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def print_settings(model):
    """Prints what `settings` returns, in words."""
    chosen = settings(model)
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    trainable = chosen["trainable_parameters"]
    print(f"device: {chosen['device']}, computing in {chosen['dtype'].removeprefix('torch.')}")
    print(f"trainable parameters: {trainable:,} of {total / 1e6:,.1f} million "
          f"({trainable / total:.2%})")
    print(f"weights in 4 bits: {chosen['share_in_4bit']:.0%} of the frozen ones")


def write_card(folder, summary: dict):
    """Writes README.md, the model card of a finished run, in place of PEFT's empty template.

    `summary` is what the run writes to summary.json.
    """
    base = base_of(summary["model"])
    card = Path(base, "README.md")
    if not Path(base).exists():
        card = Path(str(huggingface_hub.try_to_load_from_cache(base, "README.md")))
    license_of_base = huggingface_hub.ModelCard.load(card).data.license if card.exists() else None
    data = huggingface_hub.ModelCardData(
        base_model=base, library_name="peft", license=license_of_base, tags=[summary["method"]])
    versions = [f"{x.__name__} {x.__version__}" for x in (torch, transformers, peft)]
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = ["---", data.to_yaml(), "---", "", f"# {summary['method']} on {summary['model']}", "",
             f"- Method: `{summary['method']}`", f"- Started from: `{summary['model']}`",
             f"- Base model: `{base}`, license: {license_of_base or 'unknown'}",
             f"- Data: `{summary['dataset']}`", f"- Optimizer steps: {summary['step']}",
             f"- Versions: {', '.join(versions)}", "", "```", f"python {command}", "```", "",
             "| held out | before | after |", "|---|---:|---:|"]
    for name, value in summary["after"].items():
        lines.append(f"| {name} | {summary['before'][name]:.4g} | {value:.4g} |")
    Path(folder, "README.md").write_text(visible("\n".join(lines)) + "\n", encoding="utf-8")


def copy_weights(saved: dict, weights: dict):
    """Copies saved weights, {name: tensor}, into the parameters of the same names."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    differing = shapes.items() ^ {name: value.shape for name, value in saved.items()}.items()
    if differing:
        name = min(differing)[0]
        raise ValueError(f"its weights are those of another model: {name} differs or is missing")
    for name, value in saved.items():
        if not value.isfinite().all():
            raise ValueError(f"its weight {name} holds numbers that are not finite")
        weights[name].data.copy_(value)


def peak_memory() -> float | None:
    """The most memory that the process has held, in GiB: GPU memory, or main memory without a GPU.

    None on Windows without a GPU.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource  # Windows has no such module
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- tokens --------------------------------------------------------------------------------------

def load_tokenizer(name: str, chat_template: str | None = None, arguments: dict | None = None):
    """The tokenizer of a model, with a pad token and an end of turn that the model can produce.

    `chat_template` names a file that replaces the model's template; `arguments` are variables that
    the template reads, such as {"enable_thinking": false}. Both become part of the template, so
    that whoever loads a saved run gets the same tokens.

    The template of a base model such as Qwen2.5-0.5B ends turns in <|im_end|>, which the model was
    never trained on and which LoRA below a frozen head cannot teach it. There answers end in eos.
    """
    with phase(f"loading the tokenizer of {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(find(name), trust_remote_code=False)
        config = load_config(name)
        try:
            generation_config = transformers.GenerationConfig.from_pretrained(base_of(name))
        except OSError:  # the file is optional
            generation_config = transformers.GenerationConfig.from_model_config(config)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no eos token, which ends an answer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, never from pad ids
        spoken = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
        highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, *spoken)
        if highest >= config.get_text_config().vocab_size:
            raise ValueError(f"its ids go up to {highest}, beyond the model's embeddings")
        if chat_template:
            tokenizer.chat_template = Path(find(chat_template)).read_text(encoding="utf-8")
        for key, value in (arguments or {}).items():
            tokenizer.chat_template = f"{{%- set {key} = {value!r} %}}{tokenizer.chat_template}"
        if "strftime_now" in (tokenizer.chat_template or ""):  # or ids change with the calendar
            date = "{%- macro strftime_now(format) %}01 Jan 2025{% endmacro -%}"
            tokenizer.chat_template = date + tokenizer.chat_template
        end = end_of_turn_id(tokenizer)
        if end not in (None, *stop_token_ids(tokenizer, generation_config, template=False)):
            end_answers_with_eos(tokenizer, tokenizer.convert_ids_to_tokens(end))
            print(visible(
                f"{name} was not trained to end a turn: answers end with {tokenizer.eos_token}"))
    return tokenizer


def end_answers_with_eos(tokenizer, end_token: str):
    """Rewrites the template: the first end of turn behind each assistant header becomes eos."""
    question = [{"role": "user", "content": "Q"}]
    plain = tokenizer.apply_chat_template(question, tokenize=False)
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    header = asked.removeprefix(plain)
    tokenizer.chat_template = (
        f"{{%- set chat %}}{tokenizer.chat_template}{{%- endset %}}{{%- set header = {header!r} %}}"
        "{%- for part in chat.split(header) %}{{ part if loop.first else header + "
        f"part.replace({end_token!r}, {tokenizer.eos_token!r}, 1) }}}}{{%- endfor %}}")


def end_of_turn_id(tokenizer) -> int | None:
    """The special token with which the chat template closes an assistant turn, if it has one."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def stop_token_ids(tokenizer, generation_config, template: bool = True) -> list[int]:
    """Every token that ends an answer: eos, the model's own ones, the template's end of turn."""
    own = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if template:
        ids.append(end_of_turn_id(tokenizer))
    return sorted(set(ids) - {None})


def standard_message(message: dict) -> dict:
    """A message in the one form that every template understands, or ValueError.

    The content is a string, the arguments of a tool call are an object, and the role is one of
    system, user, assistant and tool. ShareGPT's `from` and `value` are `role` and `content`.
    """
    if not isinstance(message, dict) or "function_call" in message:
        raise ValueError(f"a message must be an object with role and content, not {message!r:.80}")
    role = message.get("role", message.get("from"))
    role = ROLES.get(str(role).lower(), role)
    content = message.get("content", message.get("value"))
    calls = [standard_call(call) for call in message.get("tool_calls") or []]
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"a message needs the role system, user, assistant or tool, not {role!r}")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError(f"a message has a part that is not text: {content!r:.80}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"a message needs content, a string, or tool_calls, not {content!r:.80}")
    standard = {key: value for key, value in message.items() if key not in NOT_FOR_TEMPLATES}
    standard |= {"role": role, "content": content or ""}
    return standard | {"tool_calls": calls} if calls else standard


def standard_call(call: dict) -> dict:
    """A tool call whose arguments are an object; OpenAI's API has them as JSON in a string."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of a tool call must be an object, not {arguments!r:.80}")
    return call | {"type": "function", "function": function | {"arguments": arguments}}


def standard_tools(tools) -> list | None:
    """Tool schemas as a list: they come as one schema, several, JSON, or an empty string."""
    tools = json.loads(tools or "null") if isinstance(tools, str) else tools
    return [tools] if isinstance(tools, dict) else tools or None


def is_trained(message: dict) -> bool:
    """Whether a turn of the assistant is learned: `weight` 0 or `train` false says no."""
    weight = message.get("weight", message.get("train", 1))
    if weight not in (0, 1):
        raise ValueError(f"the weight of a message must be 0 or 1, not {weight!r}")
    return bool(weight)


def render(tokenizer, messages: list, tools=None, add_generation_prompt=False) -> str:
    """A conversation as a string in which QUOTE breaks what only looks like a special token.

    A message may spell a special token: a user could otherwise type the end of a turn and forge
    the next one (prompt injection). `to_ids` reads such a token as plain characters.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template for messages: --chat-template names one")
    messages = [standard_message(message) for message in messages]
    messages, tools = json.loads(quote(tokenizer, json.dumps(
        [messages, standard_tools(tools)], ensure_ascii=False)))
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False)


def quote(tokenizer, text: str) -> str:
    """The text with QUOTE behind the first character of every special token that it spells."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, special)), lambda x: x[0][0] + QUOTE + x[0][1:], text)


def render_prompt(tokenizer, messages: list, tools=None) -> str:
    """The conversation up to the point where the model continues, as `render` gives it.

    If the last message is one of the assistant, it is a prefill: the model continues its text. A
    prefill that opens a thought of its own takes the place of the one that the template opens.
    """
    *earlier, last = [standard_message(message) for message in messages]
    if last["role"] != "assistant":
        return render(tokenizer, messages, tools, add_generation_prompt=True)
    asked = render(tokenizer, earlier, tools, add_generation_prompt=True)
    if "<think>" in last["content"] and asked.rstrip().endswith("<think>"):
        asked = asked.rstrip().removesuffix("<think>")
    return asked + quote(tokenizer, last["content"])


def check_printed(tokenizer, messages: list, tools=None):
    """Refuses a conversation of which the template drops a message, a tool call or the tools.

    Whatever should be printed gets a mark of its own at its end, and the marks are looked for.
    """
    marked, names = [standard_message(message) for message in messages], []
    for place, message in enumerate(marked, 1):
        parts = [(message, "content")]
        parts += [(call["function"], "name") for call in message.get("tool_calls", [])]
        for part, key in parts:
            if part[key].strip():
                part[key] += f"{MARK}{len(names)}{MARK}"
                kind = "content" if part is message else "tool call"
                names.append(f"the {kind} of message {place} ({message['role']})")
    text = render(tokenizer, marked, tools)
    lost = [name for i, name in enumerate(names) if f"{MARK}{i}{MARK}" not in text]
    if standard_tools(tools) and text == render(tokenizer, marked):
        lost.append("the tools")
    if lost:
        raise ValueError(f"the chat template does not print {lost[0]}")


def check_said(message: dict, place: int, printed: str):
    """Refuses an answer of which the template does not print all of the content or the thought."""
    printed = "".join(printed.replace(QUOTE, "").split())
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        if "".join((message.get(key) or "").split()) not in printed:
            raise ValueError(f"the chat template does not print the {key} of message {place} whole")
    if not message["content"].strip() and not message.get("tool_calls"):
        raise ValueError(f"message {place}, an answer, is empty")


def to_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a rendered conversation, in which what QUOTE breaks is plain text."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(QUOTE)]
    return list(itertools.chain(*parts))


def text_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a string, with BOS once, also where it spells BOS, and no eos of its own."""
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def with_end(tokenizer, ids: list[int]) -> list[int]:
    """The ids with eos at their end, unless they end in a special token, white space aside."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)  # it stands for a character, and ends nothing
    special.add(tokenizer.eos_token_id)
    last = max((place for place, i in enumerate(ids) if i in special), default=0)
    if last > 0 and not tokenizer.decode(ids[last + 1:]).strip():
        return ids[:last + 1]
    return [*ids, tokenizer.eos_token_id]


def shared_length(a: list, b: list) -> int:
    """How many items two lists have in common at their start."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def encode_prompt(tokenizer, prompt: str | list, tools=None) -> list[int]:
    """The token ids up to the point where the model answers."""
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError("a prompt must be a string or a list of messages")
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    check_printed(tokenizer, prompt, tools)
    return to_ids(tokenizer, render_prompt(tokenizer, prompt, tools))


def encode(tokenizer, prompt: str | list, answer: str | list, tools=None) -> list[list]:
    """Prompt and answer, strings or lists of messages, as examples: lists of (ids, is_answer).

    The first piece of an example is its head, which truncation keeps (BOS and system message), the
    second the rest of the prompt, the third the answer; further turns may follow in the same way.

    That is one example, unless the template rewrites earlier turns once others follow (Qwen3 drops
    their thoughts). Then each turn of the assistant becomes an example of its own, in which it is
    the last, as it is when the model answers.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return [encode_text(tokenizer, prompt, answer)]
    if isinstance(prompt, list) and prompt and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and prompt and isinstance(answer, list):
        if standard_message(answer[0])["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError("prompt and answer must be strings or lists of messages")
    chat, first, prefilled = [standard_message(x) for x in prompt + answer], len(prompt), None
    turns = [i for i, message in enumerate(answer, first)
             if chat[i]["role"] == "assistant" and is_trained(message)]
    if not turns:
        raise ValueError("there is no answer of the assistant to train on")
    if first and chat[first - 1]["role"] == "assistant" and turns[0] == first:
        prefilled = render_prompt(tokenizer, chat[:first], tools)  # which the answer continues
        prefill = chat.pop(first - 1)["content"]
        chat[first - 1]["content"] = prefill + chat[first - 1]["content"]
        turns = [turn - 1 for turn in turns]
    try:
        return [encode_chat(tokenizer, chat[:turns[-1] + 1], turns, tools, prefilled)]
    except ValueError:
        if len(turns) == 1:
            raise
        return [encode_chat(tokenizer, chat[:turn + 1], [turn], tools, None) for turn in turns]


def encode_text(tokenizer, prompt: str, answer: str) -> list[tuple[list[int], bool]]:
    """Prompt and answer as pieces, with a token at the end that ends the answer, once."""
    # one string, as tokenizers may treat its start specially; a token may span the border
    ids = with_end(tokenizer, text_ids(tokenizer, prompt + answer))
    head = int(ids[0] == tokenizer.bos_token_id)
    border = max(head, shared_length(text_ids(tokenizer, prompt), ids) if prompt else 0)
    if not answer.strip() or border == len(ids):
        raise ValueError("the answer is empty")
    return [(ids[:head], False), (ids[head:border], False), (ids[border:], True)]


def encode_chat(tokenizer, chat: list, turns: list[int], tools, prefilled: str | None) -> list:
    """A conversation as pieces; an answer goes from behind its header through its end token.

    `prefilled` is the rendered prompt of the first turn where that is more than a header.
    """
    check_printed(tokenizer, chat, tools)
    whole = render(tokenizer, chat, tools)
    ids = to_ids(tokenizer, whole)
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    pieces, done = [], 0
    for turn in turns:
        is_greeting = all(message["role"] == "system" for message in chat[:turn])
        if is_greeting and not can_render(tokenizer, chat[:turn + 1], tools):
            continue
        answered, after = whole, ids
        if turn + 1 < len(chat):
            answered = render(tokenizer, chat[:turn + 1], tools)
            after = to_ids(tokenizer, answered)
        header = render_header(tokenizer, chat, turn, tools, answered, is_greeting)
        asked = prefilled or header
        prefilled = None
        # before a token that spans the header's and the answer's newlines
        start = shared_length(to_ids(tokenizer, asked), after)
        stops = [i for i in range(start, len(after)) if after[i] in ends]
        if not stops and turn + 1 == len(chat):  # a template without an end of turn (GLM-4)
            ids = after = with_end(tokenizer, after)
        stop = stops[0] + 1 if stops else len(after)  # generation ends there
        if not stops and turn + 1 < len(chat):
            raise ValueError(f"the chat template does not end message {turn + 1}")
        if not answered.startswith(asked) or ids[:stop] != after[:stop]:
            raise ValueError(f"the chat template rewrites message {turn + 1} once others follow")
        check_said(chat[turn], turn + 1, answered[len(header):])
        pieces += [(ids[done:start], False), (ids[start:stop], True)]
        done = stop
    if not pieces:
        raise ValueError("the only answer has no question, and the template cannot render it alone")
    first = next(i for i, message in enumerate(chat) if message["role"] != "system")
    other = [*chat[:first], chat[first] | {"content": MARK}, *chat[first + 1:]]
    head = shared_length(pieces[0][0], to_ids(tokenizer, render(tokenizer, other, tools)))
    return [(pieces[0][0][:head], False), (pieces[0][0][head:], False), *pieces[1:]]


def can_render(tokenizer, messages: list, tools) -> bool:
    """Whether the template takes these messages at all: some refuse a chat without a question."""
    try:
        render(tokenizer, messages, tools)
    except jinja2.TemplateError:
        return False
    return True


def render_header(tokenizer, chat: list, turn: int, tools, answered: str, is_greeting: bool) -> str:
    """The conversation up to the first character of an answer.

    That is the generation prompt, except where the template opens a thought in it that it cuts out
    of finished turns (DeepSeek-R1), and for a greeting, which has no question before it.
    """
    asked = None
    if not is_greeting:
        asked = render(tokenizer, chat[:turn], tools, add_generation_prompt=True)
        if answered.startswith(asked):
            return asked
    said = render(tokenizer, [*chat[:turn], {"role": "assistant", "content": MARK}], tools)
    header = said.partition(MARK)[0]
    if not answered.startswith(header) or not (asked or header).startswith(header):
        raise ValueError(f"the chat template writes message {turn + 1} in another way than it asks "
                         "the model for it")
    return header


def encode_preference(tokenizer, row: dict) -> tuple[list, list]:
    """Chosen and rejected as pieces: the head, the rest of the prompt, the answer.

    The prompt is a column, or what both answers begin with: messages, or a string.
    """
    prompt, answers = prompt_of(row, tokenizer), [row.get("chosen"), row.get("rejected")]
    if not all(answers) or answers[0] == answers[1]:
        missing = [name for name in ("chosen", "rejected") if not row.get(name)]
        raise ValueError(f"the column {missing[0]} is missing or empty" if missing
                         else "chosen and rejected are the same")
    if isinstance(answers[0], list) and isinstance(answers[1], list):
        answers = [with_system(answer, row) if standard_message(answer[0])["role"] == "user"
                   else answer for answer in answers]  # the former are whole conversations
        shared = answers[0][:shared_length(*answers)]
        if any(standard_message(x)["role"] == "user" for x in shared):  # as in UltraFeedback
            prompt = shared
        if not prompt:
            raise ValueError("there is no prompt: no such column, and no question in both answers")
        if isinstance(prompt, list):
            length = len(prompt)
            answers = [x[length:] if x[:length] == prompt else x for x in answers]
    others = [name for name, value in row.items() if name not in ("chosen", "rejected")
              and isinstance(value, str) and " " in value.strip()]
    if not prompt and others:  # else the common start of both answers would pass for the question
        raise ValueError(f"there is no column prompt; if that is {others[0]}, add --columns prompt="
                         f"{others[0]}, else remove it")
    sides = [encode(tokenizer, prompt, answer, row.get("tools")) for answer in answers]
    if len(sides[0]) > 1 or len(sides[1]) > 1:
        raise ValueError("the chat template rewrites turns of the answer once others follow")
    chosen, rejected = sides[0][0], sides[1][0]
    if not prompt:  # half a word gives other tokens than a whole
        head = chosen[0]
        texts = [[token for ids, _ in side[1:] for token in ids] for side in (chosen, rejected)]
        border = shared_length(*texts)
        chosen, rejected = [[head, (ids[:border], False), (ids[border:], True)] for ids in texts]
    asked = [side[0][0] + side[1][0] for side in (chosen, rejected)]
    if not 0 < shared_length(*asked) == min(map(len, asked)) or not chosen[2][0]:
        raise ValueError("chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same tokens")
    return chosen, rejected


def shown_text(tokenizer, ids: list[int]) -> str:
    """Token ids as legible text: special tokens stay, so that roles and ends of turns show."""
    return visible(tokenizer.decode(ids))


def show(tokenizer, input_ids: list[int], loss_mask: list[int], heading: str | None = None):
    """Prints an example as the model sees it, in green where the mask is 1."""
    if heading:
        print(heading)
    for trained, group in itertools.groupby(zip(input_ids, loss_mask, strict=True), lambda x: x[1]):
        text = shown_text(tokenizer, [token for token, _ in group])
        print(f"\033[32m{text}\033[0m" if trained else text, end="")
    print()


# ---- rows ----------------------------------------------------------------------------------------

def read_file(path: Path) -> list:
    """The rows of a local file: .json, .jsonl, .csv or .tsv, each also as .gz, or .parquet.

    Every value of a .csv or .tsv file is a string: "0123" and "None" stay what they are.
    """
    zipped = path.suffix == ".gz"
    kind = Path(path.stem).suffix.lower() if zipped else path.suffix.lower()
    if kind == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if kind not in FORMATS:
        raise ValueError(f"its name must end in {', '.join(FORMATS)} or .parquet")
    with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            csv.field_size_limit(2**31 - 1)
            rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
            for place, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    raise ValueError(f"row {place} has not as many cells as the header: {row}")
            return rows
        text = file.read().strip()
    if not text.startswith("["):  # an object per line
        text = "[" + ",\n".join(line for line in text.splitlines() if line.strip()) + "]"
    return json.loads(text)


def load_rows(source: str, split: str, limit: int, seed: int, columns=()) -> list[dict]:
    """The rows of a file, or up to `limit` random ones of a Hub dataset, NAME or NAME:CONFIG.

    `columns` holds other names of columns: "prompt=query" reads the column query as the prompt.
    """
    with phase(f"reading {source}"):
        path = Path(find(source))
        if path.is_file() or path.suffix.lower() in (*FORMATS, ".parquet", ".gz"):
            rows = read_file(path)
        else:
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split).shuffle(seed=seed)
            rows = rows.select(range(min(limit, len(rows))))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is not an object whose keys are the names of columns")
        rows = [without_nones(row) for row in rows]
        names = {old: new for new, _, old in (pair.partition("=") for pair in columns)}
        for old in names:
            if not any(old in row for row in rows):
                raise ValueError(f"there is no column {old}, which --columns names")
        named = {*names, *names.values()}
        return [{key: value for key, value in row.items() if key not in named}
                | {new: row[old] for old, new in names.items() if old in row} for row in rows]


def without_nones(value):
    """`datasets` gives every row the keys of all others; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def from_cell(name: str, value):
    """A value of a conversation: a whole number as a string, and JSON from a cell of messages."""
    if type(value) is int and name in SPOKEN:
        return str(value)
    if isinstance(value, str) and name in SPOKEN and value.strip()[:1] + value.strip()[-1:] == "[]":
        with contextlib.suppress(json.JSONDecodeError):  # a text in brackets
            items = json.loads(value)
            if name in ("completions", "labels") or all(isinstance(x, dict) for x in items):
                return items
    return value


def with_system(messages: list, row: dict) -> list:
    """The messages of a row below the message in its column `system`, unless they have one."""
    system = row.get("system") or row.get("system_prompt")
    if not system or any(standard_message(message)["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_of(row: dict, tokenizer) -> str | list:
    """The prompt of a row, a string or a list of messages; "" if it has none.

    A question under another name than `prompt`, or with a `system` column, becomes messages where
    the tokenizer has a template for them.
    """
    names = [name for name in QUESTIONS if row.get(name)]
    if not names:
        return ""
    prompt, system = row[names[0]], row.get("system") or row.get("system_prompt")
    if isinstance(prompt, list):
        return with_system(prompt, row)
    if names[0] == "prompt" and not system:
        return prompt
    if names[0] == "instruction":
        parts = [prompt, row.get("input"), row.get("context")]
        prompt = "\n\n".join(part for part in parts if part)
    if tokenizer.chat_template:
        return with_system([{"role": "user", "content": prompt}], row)
    return "\n\n".join([system, prompt, ""] if system else [prompt, ""])


def answer_of(row: dict):
    """The answer of a row under the first of its usual names, or None."""
    return next((row[name] for name in ANSWERS if row.get(name)), None)


def unused_columns(row: dict, made, make, *options) -> list[str]:
    """The columns that look like part of the conversation, but without which nothing changes."""
    unused = []
    for name in sorted(SPOKEN & row.keys()):
        try:
            other = make({key: value for key, value in row.items() if key != name}, *options)
        except Exception:  # the row needs it
            continue
        unused += [name] if row[name] and other == made else []
    return unused


def encode_rows(source: str, rows: list[dict], make, tokenizer, max_length: int) -> list[dict]:
    """What `make` makes of the rows: an example each, or a list of them. It may refuse a row."""
    encoded, refused, unused = [], [], None
    max_length = min(max_length, tokenizer.model_max_length)
    for place, row in enumerate(rows, 1):
        try:
            row = {key: from_cell(key, value) for key, value in row.items()}
            made = make(row, tokenizer, max_length)
            encoded.append(made if isinstance(made, list) else [made])
            if unused is None:
                unused = unused_columns(row, made, make, tokenizer, max_length)
        except Exception as error:  # templates and tokenizers raise types of their own
            refused.append(f"row {place}: {error}")
    examples = list(itertools.chain(*encoded))
    report = f"{source}: {len(rows)} rows, {len(examples)} examples"
    if divided := sum(len(several) > 1 for several in encoded):
        report += f"; {divided} rows became one per answer"
    if truncated := sum(example.get("truncated", False) for example in examples):
        report += f"; {truncated} are truncated"
    if unused:
        report += f"; not used: the column {', '.join(unused)}"
    if refused:
        report += f"; {len(refused)} rows cannot be used, the first is {refused[0]}"
    if not examples:
        fail(f"{report}; columns: {', '.join(rows[0]) if rows else 'none'}")
    print(f"{visible(report):.500}")
    return examples


def load_examples(args, make, tokenizer, limit: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples; without --eval-dataset at most a fifth, no prompt in both.

    Where an example has a "key", that must not be in both, instead of its prompt.
    """
    with phase(f"reading {args.eval_dataset}"):
        files = [os.path.realpath(name or "") for name in (args.dataset, args.eval_dataset)]
    if files[0] == files[1]:
        fail(f"--eval-dataset {args.dataset} is what is trained on: without it, some is held out")
    rows = load_rows(args.dataset, args.split, limit + args.eval_size, args.seed, args.columns)
    examples = encode_rows(args.dataset, rows, make, tokenizer, args.max_length)
    if args.eval_dataset:
        rows = load_rows(args.eval_dataset, args.split, args.eval_size, args.seed, args.columns)
        rows = rows[:args.eval_size]
        return examples, encode_rows(args.eval_dataset, rows, make, tokenizer, args.max_length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed))
    held_out = [examples[i] for i in order[:min(args.eval_size, len(examples) // 5)]]
    keys = {tuple(example.get("key", example["prompt"])) for example in held_out}
    training = [x for x in examples if tuple(x.get("key", x["prompt"])) not in keys]
    if not training or not held_out:
        fail("too few different prompts to hold some out: add rows, or name an --eval-dataset")
    print(f"{len(training)} to train on, {len(held_out)} held out; "
          f"{len(examples) - len(training) - len(held_out)} left out, as their prompt is held out")
    return training, held_out
