"""Losses, LARS and momentum encoders for PyTorch.

The contrastive losses compute similarities in tiles and never store the N x N matrix: memory is linear in the number of rows. Each is a
custom operation of ``torch.library`` with a fake implementation, so ``torch.compile`` keeps it in its graph as one call. The gradient is
computed together with the loss, where one is wanted; second and forward-mode derivatives are refused.

Tensors are on the CPU or on an NVIDIA GPU, all of a call on one. They are float32, or, on the CPU, float64, which runs on the engine's
reference device: exact and slow, for checks. Of float16 and bfloat16 all is computed in float32, and the loss and the gradients are
rounded. Tensors that are not contiguous are made so.

Float32 similarities are off by about 1e-7, so a contrastive loss may be off by about 1e-7 / temperature, however small it is; where that
makes it negative it is 0.

On the CPU rows are copied once. On a GPU nothing is copied from one to the other: the engine's kernels read PyTorch's memory, and the loss
and the gradients are tensors in the engine's, handed over by DLPack. The kernels run on a stream of the engine's own, which waits for PyTorch's current stream and
for which that one waits, by events; the host never waits, and the loss stays on the GPU. Memory of freed gradients goes back to the engine,
which keeps it for later calls: ``torch.cuda.empty_cache`` does not free it, and a CUDA graph cannot capture the losses.

The losses are over the rows that they are given. Under ``torch.distributed`` they take no process group: gather the embeddings of all
processes first if the loss is meant to be over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.dlpack import from_dlpack

from selfsup import _native

# Without types in PyTorch.
_unpack_dual: Callable[..., Any] = forward_ad.unpack_dual

__all__ = [
    "LARS",
    "info_nce",
    "l2_normalize",
    "neg_cosine",
    "nt_xent",
    "sinkhorn",
    "swapped_prediction",
    "update_momentum",
]


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5, *, normalize: bool = True) -> Tensor:
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, equation 1, arXiv:2002.05709): the mean over all 2n embeddings.

    Args:
        a, b: ``[n, d]``, the embeddings of two views, n at least 2; row i of one is the positive of row i of the other.
        temperature: a number within 1e-6 to 1e6; no tensor, which would get no gradient. SimCLR's CIFAR-10 runs have 0.5, its ImageNet
            runs 0.1.
        normalize: whether rows are scaled to unit length first; if not, they must have it.

    Returns a scalar, which lightly's ``NTXentLoss(temperature)(a, b)`` returns too.

    Raises:
        ValueError: shapes differ, there is one pair only, the temperature is out of range, or devices do not fit.
    """
    _matrices("nt_xent", a=a, b=b)
    _same("nt_xent", a, b)
    if len(a) < 2:
        raise ValueError("nt_xent: one pair has no negatives; at least two are needed")
    dtype, rows = torch.promote_types(a.dtype, b.dtype), torch.cat([_wide(a), _wide(b)])
    if normalize:
        rows = l2_normalize(rows)
    return _loss("nt_xent", dtype, rows, None, None, temperature)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.07, *, normalize: bool = True) -> Tensor:
    """InfoNCE with a queue of negatives, the loss of MoCo (He et al. 2020, equation 1, arXiv:1911.05722).

    Args:
        q: ``[n, d]``, the queries.
        k: ``[n, d]``, their keys; MoCo detaches them.
        queue: ``[m, d]``, the negatives, one per row (lightly's and MoCo's are ``[d, m]``: pass ``queue.T``). It has no gradient.
        temperature: as for :func:`nt_xent`.
        normalize: whether the rows of ``q`` and ``k`` are scaled to unit length first; if not, they must have it. Those of ``queue`` must.

    Returns a scalar.

    Raises:
        ValueError: shapes do not fit, the temperature is out of range, or devices do not fit.
    """
    _matrices("info_nce", q=q, k=k, queue=queue)
    _same("info_nce", q, k)
    if queue.shape[1] != q.shape[1]:
        raise ValueError(f"info_nce: queries {list(q.shape)}, queue {list(queue.shape)}: rows differ in length")
    dtype, q, k = q.dtype, _wide(q), _wide(k)
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    return _loss("info_nce", dtype, q, k, _wide(queue.detach()), temperature)


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """The mean negative cosine of the rows of ``p`` and ``z``, both ``[n, d]``: SimSiam's loss (Chen and He 2021, equation 1,
    arXiv:2011.10566), and half of BYOL's minus a constant. Pass ``z.detach()`` to stop the gradient, as both do.

    Norms are at least 1e-12, as in ``torch.nn.functional.normalize``; in ``cosine_similarity`` they are at least 1e-8.

    Returns a scalar in -1 to 1.

    Raises:
        ValueError: shapes differ, or devices do not fit.
    """
    _matrices("neg_cosine", p=p, z=z)
    _same("neg_cosine", p, z)
    return _loss("neg_cosine", p.dtype, _wide(p), _wide(z), None, 1.0)


def swapped_prediction(scores: Tensor, assignments: Tensor, temperature: float = 0.1) -> Tensor:
    """The cross-entropy of one view's scores with the assignments of another, a term of SwAV's loss (Caron et al. 2020, equation 2,
    arXiv:2006.09882).

    Args:
        scores: ``[n, k]``, products of embeddings and prototypes.
        assignments: ``[n, k]``, from :func:`sinkhorn`. They have no gradient.
        temperature: as for :func:`nt_xent`.

    Returns a scalar.

    Raises:
        ValueError: shapes differ, the temperature is out of range, or devices do not fit.
    """
    _matrices("swapped_prediction", scores=scores, assignments=assignments)
    _same("swapped_prediction", scores, assignments)
    return _loss("soft_cross_entropy", scores.dtype, _wide(scores), None, _wide(assignments.detach()), temperature)


def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of rows to prototypes that use all prototypes equally (Caron et al. 2020, section 3.1, arXiv:2006.09882).

    Args:
        scores: ``[n, k]``.
        epsilon: above 0.
        iterations: at least 1.

    Returns ``[n, k]``, rows that sum to 1, without a gradient. Scores whose exponentials leave the range of their dtype (in float32 a row
    whose largest score is more than 87 epsilon below the largest of all) are computed by logarithms in float64 on the CPU; on a GPU such a
    row is 0. On the CPU a NaN makes all NaN.

    Raises:
        ValueError: the shape is another one, a setting is out of range, or the device does not fit.
    """
    _matrices("sinkhorn", scores=scores)
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"sinkhorn: epsilon is {epsilon} and iterations {iterations}; they must be above 0")
    return torch.ops.selfsup.sinkhorn(_wide(scores.detach()), epsilon, iterations).to(scores.dtype)  # type: ignore[no-any-return]


def l2_normalize(x: Tensor) -> Tensor:
    """The rows of ``x`` ``[n, d]`` scaled to unit length; norms are at least 1e-12. This is ``torch.nn.functional.normalize``, which is as
    fast as a pass over the rows can be; it works on any device.

    Raises:
        ValueError: the shape is another one.
    """
    _matrices("l2_normalize", anywhere=True, x=x)
    return torch.nn.functional.normalize(x, dim=1, eps=1e-12)


def _loss(
    name: str, dtype: torch.dtype, a: Tensor, b: Optional[Tensor], constant: Optional[Tensor], temperature: float
) -> Tensor:
    """The loss of tensors of float32 or float64, rounded to ``dtype``."""
    if isinstance(temperature, Tensor):
        raise TypeError(f"{name}: the temperature is a tensor, which would get no gradient; it must be a number")
    # Below, the similarities' errors in float32 are of the size of the loss, and then overflow; above, gradients vanish.
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"{name}: the temperature is {temperature}; it must be within 1e-6 to 1e6")
    if any(x is not None and _unpack_dual(x).tangent is not None for x in (a, b)):
        raise NotImplementedError("selfsup's losses have no forward-mode derivative")
    gradients = torch.is_grad_enabled()
    wanted = [gradients and a.requires_grad, gradients and b is not None and b.requires_grad]
    loss, _, _ = torch.ops.selfsup.loss(name, a, b, constant, wanted, float(temperature))
    return loss.to(dtype)  # type: ignore[no-any-return]


def _matrices(name: str, anywhere: bool = False, **tensors: Tensor) -> None:
    for which, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {which} is a {type(tensor).__name__}, not a tensor")
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: {which} is {list(tensor.shape)}; it must be [rows, columns], neither of them 0")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {which} is {tensor.dtype}; it must hold floats")
        if tensor.device.type not in ("cpu", "cuda") and not anywhere:
            raise ValueError(f"{name}: {which} is on {tensor.device}; selfsup's losses compute on the CPU and on NVIDIA GPUs")
        if tensor.device.type == "cuda" and tensor.dtype == torch.float64 and not anywhere:
            raise ValueError(
                f"{name}: {which} is float64 on {tensor.device}, and the engine computes float64 on the CPU only: "
                f"pass {which}.float(), or {which}.cpu()"
            )
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors are on {' and '.join(sorted(devices))}; all must be on one device")


def _same(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {list(a.shape)} and {list(b.shape)} differ")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# Losses that are below 0 by rounding alone.
_ABOVE_ZERO = ("nt_xent", "info_nce")


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _loss_now(
    name: str, a: Tensor, b: Optional[Tensor], constant: Optional[Tensor], wanted: list[bool], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [_array(x.to(a.dtype)) for x in (a, b, constant) if x is not None]
    of_inputs, threads = _wanted_of_inputs(b, constant, wanted), torch.get_num_threads()
    value, gradients = _native.loss_and_gradients(name, inputs, of_inputs, temperature, threads)
    made = [a.new_empty(0) if g is None else torch.from_numpy(g) for g in [*gradients, None][:2]]
    value = max(value, 0.0) if name in _ABOVE_ZERO else value
    return torch.tensor(value, dtype=a.dtype), made[0], made[1]


def _loss_on_gpu(
    name: str, a: Tensor, b: Optional[Tensor], constant: Optional[Tensor], wanted: list[bool], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [x.detach().to(a.dtype).contiguous() for x in (a, b, constant) if x is not None]
    # PyTorch hands over tensors of its current GPU only.
    with torch.cuda.device(a.device):
        value, gradients = _native.loss_and_gradients_on_gpu(
            name, inputs, _wanted_of_inputs(b, constant, wanted), temperature, _stream()
        )
        made = [a.new_empty(0) if g is None else from_dlpack(g) for g in [*gradients, None][:2]]
        loss = from_dlpack(value)
        return loss.clamp(min=0) if name in _ABOVE_ZERO else loss, made[0], made[1]


def _stream() -> int:
    """The number of PyTorch's current stream on its current GPU in DLPack, where 0 means nothing."""
    return torch.cuda.current_stream().cuda_stream or 1


def _wanted_of_inputs(b: Optional[Tensor], constant: Optional[Tensor], wanted: list[bool]) -> list[bool]:
    return [wanted[0], *([wanted[1]] if b is not None else []), *([False] if constant is not None else [])]


def _loss_fake(
    name: str, a: Tensor, b: Optional[Tensor], constant: Optional[Tensor], wanted: list[bool], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = [x.new_empty(x.shape) if x is not None and w else a.new_empty(0) for x, w in ((a, wanted[0]), (b, wanted[1]))]
    return a.new_empty(()), made[0], made[1]


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.wanted = inputs[4]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, d: Optional[Tensor], da: Optional[Tensor], db: Optional[Tensor]) -> tuple[Any, ...]:
    if da is not None or db is not None:
        raise NotImplementedError("selfsup's losses have no second derivative")
    gradients = [d * saved if d is not None and w else None for saved, w in zip(ctx.saved_tensors, ctx.wanted)]
    return None, gradients[0], gradients[1], None, None, None


def _sinkhorn_now(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    below = scores.max() - scores.amax(1).min()
    # Not where it is NaN, either.
    if not below <= epsilon * (87.0 if scores.dtype == torch.float32 else 708.0):
        return _sinkhorn_of_logarithms(scores.double() / epsilon, iterations).to(scores.dtype)
    return torch.from_numpy(_native.sinkhorn(_array(scores), epsilon, iterations, torch.get_num_threads()))


def _sinkhorn_of_logarithms(scores: Tensor, iterations: int) -> Tensor:
    """Constant factors of rows and columns are left out: the last step, over rows, cancels them."""
    of_rows = scores.new_zeros(len(scores), 1)
    for _ in range(iterations):
        of_columns = torch.logsumexp(scores - of_rows, 0)
        of_rows = torch.logsumexp(scores - of_columns, 1, keepdim=True)
    return torch.exp(scores - of_columns - of_rows)


def _sinkhorn_on_gpu(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    with torch.cuda.device(scores.device):
        given = scores.detach().contiguous()
        return from_dlpack(_native.sinkhorn_on_gpu(given, epsilon, iterations, _stream()))


def _define(name: str, schema: str, now: Callable[..., Any], on_gpu: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Where PyTorch knows the tag, `torch.compile` leaves the operation out of its CUDA graphs.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    words = {} if unsafe is None else {"tags": [unsafe]}
    op = torch.library.custom_op(f"selfsup::{name}", now, mutates_args=(), device_types="cpu", schema=schema, **words)
    op.register_kernel("cuda", on_gpu)
    op.register_fake(fake)
    return op


_define(
    "loss",
    "(str name, Tensor a, Tensor? b, Tensor? constant, bool[] wanted, float temperature) -> (Tensor, Tensor, Tensor)",
    _loss_now,
    _loss_on_gpu,
    _loss_fake,
).register_autograd(_loss_backward, setup_context=_loss_setup)
_define(
    "sinkhorn",
    "(Tensor scores, float epsilon, int iterations) -> Tensor",
    _sinkhorn_now,
    _sinkhorn_on_gpu,
    lambda scores, epsilon, iterations: scores.new_empty(scores.shape),
)

Variant = Literal["simclr", "byol", "larc", "lightly", "solo-learn"]

# What the published implementations differ in: the trust coefficient, the denominator of the ratio, whether the ratio is clipped, whether
# the rate is applied inside the momentum, whether biases and norms are exempt, and whether all is without weight decay.
_VARIANTS: dict[str, dict[str, Any]] = {
    # google-research/simclr, lars_optimizer.py
    "simclr": {"trust": 1e-3, "of_decayed": True, "clip": False, "lr_in_momentum": True, "exempt": True, "exempt_undecayed": False},
    # deepmind-research, byol/utils/optimizers.py
    "byol": {"trust": 1e-3, "of_decayed": True, "clip": False, "lr_in_momentum": False, "exempt": True, "exempt_undecayed": False},
    # NVIDIA/apex, apex/parallel/LARC.py, around SGD, as used by SwAV and SimSiam's linear evaluation
    "larc": {"trust": 1e-3, "of_decayed": False, "clip": False, "lr_in_momentum": False, "exempt": False, "exempt_undecayed": False},
    # lightly, utils/lars.py, with biases and batch norm in its group without weight decay
    "lightly": {"trust": 1e-3, "of_decayed": False, "clip": False, "lr_in_momentum": False, "exempt": True, "exempt_undecayed": True},
    # solo-learn, utils/lars.py, with the settings of its CIFAR recipes
    "solo-learn": {"trust": 0.02, "of_decayed": False, "clip": True, "lr_in_momentum": False, "exempt": True, "exempt_undecayed": False},
}


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888), in the five published implementations that differ.

    Each parameter's gradient is scaled by ``trust |w| / |g|``. The variants differ in the denominator, in clipping, in where the rate
    enters the momentum, and in what is exempt. Works on any device, on tensors of any dtype.

    Args:
        params: parameters or groups of them. A group may set ``lr``, ``momentum``, ``weight_decay``, ``trust`` and ``exempt``: ``True``
            (no weight decay, no trust ratio) or ``False``.
        lr: the learning rate, at least 0.
        momentum: at least 0 and below 1.
        weight_decay: at least 0.
        variant: ``"simclr"`` and ``"byol"`` (ratio by ``|g + wd w|``, biases and norms exempt; SimCLR applies the rate inside the
            momentum), ``"larc"`` (apex: ratio by ``|g| + wd |w|``, nothing exempt), ``"lightly"`` (as LARC, biases and norms exempt, and so
            is all where ``weight_decay`` is 0), or ``"solo-learn"`` (as lightly's, clipped to the rate of SGD, trust 0.02).
        trust: the trust coefficient, above 0; the variant's without it.

    Biases and norms are the parameters of fewer than two dimensions. A ``state_dict`` carries the variant.

    Raises:
        ValueError: a setting, of a group too, is out of range, or a loaded state is of another variant.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        variant: Variant = "simclr",
        trust: Optional[float] = None,
    ) -> None:
        if variant not in _VARIANTS:
            raise ValueError(f"variant is {variant!r}; it is one of {', '.join(map(repr, _VARIANTS))}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": _VARIANTS[variant]["trust"] if trust is None else trust,
            "exempt": None,
            "variant": variant,
        }
        super().__init__(params, defaults)

    @property
    def _variant(self) -> dict[str, Any]:
        # Of the defaults, which copies and pickles have, too.
        return _VARIANTS[self.defaults["variant"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with settings of its own where it has any."""
        own = {**self.defaults, **param_group} if isinstance(param_group, dict) else self.defaults
        ranges = {
            "lr": own["lr"] >= 0,
            "momentum": 0 <= own["momentum"] < 1,
            "weight_decay": own["weight_decay"] >= 0,
            "trust": own["trust"] > 0,
        }
        for name, is_within in ranges.items():
            if not is_within:
                raise ValueError(f"LARS: {name} is {own[name]}, which is out of range")
        if own["variant"] != self.defaults["variant"]:
            raise ValueError(f"LARS: a group is of variant {own['variant']!r}, and the optimizer of {self.defaults['variant']!r}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another LARS of the same variant."""
        own = self.defaults["variant"]
        for group in state_dict["param_groups"]:
            # A state of an older version has none.
            if group.get("variant", own) != own:
                raise ValueError(f"the state is of a LARS of variant {group['variant']!r}, and this one is of {own!r}")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("variant", own)

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:  # type: ignore[override]
        """Updates the parameters along their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():  # type: ignore[no-untyped-call]
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for exempt in (False, True):
                params = [p for p in given if self._is_exempt(group, p) == exempt]
                if params:
                    self._update(group, params, exempt)
        return loss

    def _is_exempt(self, group: dict[str, Any], p: Tensor) -> bool:
        if self._variant["exempt_undecayed"] and group["weight_decay"] == 0:
            return True
        if group["exempt"] is not None:
            return bool(group["exempt"])
        return bool(self._variant["exempt"]) and p.ndim < 2

    def _update(self, group: dict[str, Any], params: list[Tensor], exempt: bool) -> None:
        lr, gradients = group["lr"], [p.grad for p in params if p.grad is not None]
        for p, gradient in zip(params, gradients):
            if gradient.is_sparse:
                raise ValueError("LARS takes no sparse gradients")
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        if not exempt:
            gradients = self._scaled(group, params, gradients)
        in_lr, out_lr = (lr, 1.0) if self._variant["lr_in_momentum"] else (1.0, lr)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients, alpha=in_lr)
        torch._foreach_add_(params, momenta, alpha=-out_lr)

    def _scaled(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """The gradients with weight decay, times the trust ratio."""
        lr, trust, decay = group["lr"], group["trust"], group["weight_decay"]
        decayed = list(torch._foreach_add(gradients, params, alpha=decay))
        w, g = _norms(params), _norms(gradients)
        if self._variant["of_decayed"]:
            d = _norms(decayed)
            known = [(w > 0) & (d > 0) for w, d in zip(w, d)]
            ratios = [trust * w / d for w, d in zip(w, d)]
        else:
            known = [(w > 0) & (g > 0) for w, g in zip(w, g)]
            ratios = [trust * w / (g + decay * w + 1e-8) for w, g in zip(w, g)]
            # Without a ratio these take the gradient as it is, without decay.
            decayed = [torch.where(k, d, g) for k, d, g in zip(known, decayed, gradients)]
        if self._variant["clip"]:
            ratios = [torch.clamp(ratio / lr, max=1.0) if lr > 0 else torch.ones_like(ratio) for ratio in ratios]
        scales = [torch.where(k, ratio, torch.ones_like(ratio)) for k, ratio in zip(known, ratios)]
        return [(scale * d).to(d.dtype) for scale, d in zip(scales, decayed)]


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms, in float32 at least: the square of a large half overflows."""
    wide = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    return list(torch._foreach_norm(wide))


@torch.no_grad()
def update_momentum(online: torch.nn.Module, target: torch.nn.Module, tau: float) -> None:
    """Moves the parameters of a momentum encoder: ``target = tau target + (1 - tau) online``, for all of them in one call of PyTorch's
    foreach kernels. Parameters are paired by their names, in whatever order the modules have them.

    Buffers such as running statistics are not averaged, as in MoCo's and BYOL's code. The modules may be on any device.

    Raises:
        ValueError: the modules' parameters differ in name, shape or dtype, one holds integers, or ``tau`` is not in 0 to 1.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"update_momentum: tau is {tau}; it must lie in 0 to 1")
    of_online, of_target = dict(online.named_parameters()), dict(target.named_parameters())
    if of_online.keys() != of_target.keys():
        names = ", ".join(sorted(of_online.keys() ^ of_target.keys()))
        raise ValueError(f"update_momentum: the two modules have different parameters: only one has {names}")
    for name, p in of_online.items():
        of_both = [f"{list(of[name].shape)} of {of[name].dtype}" for of in (of_online, of_target)]
        if of_both[0] != of_both[1]:
            raise ValueError(f"update_momentum: the two modules have different parameters: {name} is {of_both[0]} and {of_both[1]}")
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(f"update_momentum: {name} is of {p.dtype}, which has no mean")
    if of_online:
        torch._foreach_lerp_([of_target[name] for name in of_online], list(of_online.values()), 1 - tau)
