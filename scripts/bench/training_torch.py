"""Training of our small models in plain eager PyTorch: the other side of training_cpu.

    python training_torch.py FOLDER THREADS DTYPE   (torch, numpy and safetensors are all it needs)

What a PyTorch user would write: an nn.Module, scaled_dot_product_attention, cross-entropy of the
learnt positions alone, clip_grad_norm_, AdamW, or Muon of the matrices beside it; torch.autocast
where DTYPE is bfloat16. Requests come as lines of JSON on stdin; answers go to stdout.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


def main() -> None:
    """Answers requests until stdin ends."""
    torch.set_num_threads(int(sys.argv[2]))
    side = Side(Path(sys.argv[1]), getattr(torch, sys.argv[3]))
    jobs = {"about": about, "loss": side.loss, "steps": side.steps}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(jobs[request.pop("do")](**request)), flush=True)


def about() -> dict[str, Any]:
    """Version and threads."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class Side:
    """The model, its optimiser and its data."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.dtype = dtype
        self.config = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "arrays.safetensors")
        self.tokens = arrays.pop("tokens").long()  # [S, B, L]: batches
        self.noisy, self.learnt = arrays.pop("noisy").long(), arrays.pop("learnt").bool()
        self.model = Model(self.config, arrays)
        self.optimisers = optimisers(self.model, self.config["optimiser"])
        self.done = 0

    def loss(self) -> float:
        """Of the first batch and the noise that came with it."""
        with torch.no_grad():
            return float(self._loss(self.tokens[0], self.noisy, self.learnt))

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each training step, and the last loss."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            tokens = self.tokens[self.done % len(self.tokens)]
            noisy = learnt = None
            if self.config["masked"]:
                learnt = torch.rand(tokens.shape) < torch.rand(len(tokens), 1)
                noisy = torch.where(learnt, self.config["mask_id"], tokens)
            self.model.zero_grad()
            loss = self._loss(tokens, noisy, learnt)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config["optimiser"]["clip"])
            for optimiser in self.optimisers:
                optimiser.step()
            last = loss.item()
            self.done += 1
            found.append(time.perf_counter() - start)
        return {"seconds": found, "loss": last}

    def _loss(self, tokens, noisy, learnt):
        """Mean nats: of the next tokens, or of the masked ones."""
        masked = self.config["masked"]
        narrow = self.dtype != torch.float32
        with torch.autocast("cpu", self.dtype if narrow else None, enabled=narrow):
            scores = self.model(noisy if masked else tokens)
        if not masked:
            return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        scores = scores[learnt].float()
        scores[:, self.config["mask_id"]] = -torch.inf
        return F.cross_entropy(scores, tokens[learnt])


def optimisers(model: nn.Module, o: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """What PyTorch has of the kind."""
    matrices = []
    if o["kind"] == "muon":
        matrices = [x for block in model.blocks for x in block.parameters() if x.ndim == 2]
    own = {id(x) for x in matrices}
    rest = [x for x in model.parameters() if id(x) not in own]
    rate = {"lr": o["learning_rate"], "weight_decay": o["weight_decay"]}
    adamw = torch.optim.AdamW(rest, **rate, betas=(o["b1"], o["b2"]), eps=o["eps"])
    if not matrices:
        return [adamw]
    adjust = "match_rms_adamw"
    return [adamw, torch.optim.Muon(matrices, **rate, momentum=o["momentum"], adjust_lr_fn=adjust)]


class Model(nn.Module):
    """The model of our config, with its weights."""

    def __init__(self, config: dict[str, Any], arrays: dict[str, torch.Tensor]):
        super().__init__()
        self.causal = config["attention"] == "causal"
        self.embed = nn.Embedding.from_pretrained(arrays["embed"], freeze=False)
        self.positions = None
        if "positions" in arrays:
            self.positions = nn.Embedding.from_pretrained(arrays["positions"], freeze=False)
        self.blocks = nn.ModuleList(Block(config, arrays, i) for i in range(config["num_layers"]))
        self.norm = _norm(arrays["final_norm"], config)
        self.head = _linear(arrays["head"].T)
        size = config["head_dim"]
        frequency = config["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        angle = torch.arange(config["length"])[:, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        """Scores [B, L, V]."""
        hidden = self.embed(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, self.cos, self.sin, self.causal)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """A layer."""

    def __init__(self, config: dict[str, Any], arrays: dict[str, torch.Tensor], layer: int):
        super().__init__()
        self.heads, self.size, dim = config["num_heads"], config["head_dim"], config["dim"]
        own = {name: x[layer] for name, x in arrays.items() if name.startswith("layers.")}
        attention, mlp = (
            {name.split(".")[-1]: x for name, x in own.items() if f".{part}." in name}
            for part in ("attention", "mlp")
        )
        self.before, self.between = _norm(attention["norm"], config), _norm(mlp["norm"], config)
        self.q, self.k, self.v = (_linear(attention[name].reshape(dim, -1)) for name in "qkv")
        self.o = _linear(attention["o"].reshape(-1, dim))
        self.q_norm, self.k_norm = (_norm(attention[f"{name}_norm"], config) for name in "qk")
        self.gate, self.up, self.down = (_linear(mlp[name]) for name in ("gate", "up", "down"))

    def forward(self, hidden, cos, sin, causal: bool):
        """[B, L, D]."""
        x = self.before(hidden)
        shape = (*x.shape[:2], self.heads, self.size)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = _turn(self.q_norm(q), cos, sin), _turn(self.k_norm(k), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        x = self.between(hidden)
        return hidden + self.down(F.silu(self.gate(x)) * self.up(x))


def _turn(x, cos, sin):
    """RoPE of [B, N, L, H]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _norm(scale, config: dict[str, Any]) -> nn.RMSNorm:
    norm = nn.RMSNorm(len(scale), eps=config["norm_eps"])
    norm.weight.data.copy_(scale)
    return norm


def _linear(weight) -> nn.Linear:
    """The projection x @ weight."""
    linear = nn.Linear(*weight.shape, bias=False)
    linear.weight.data.copy_(weight.T)
    return linear


if __name__ == "__main__":
    main()
