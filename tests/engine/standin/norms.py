"""RMSNorm and LayerNorm of rows. No rows at all are refused, as the kernels refuse statistics of no elements."""

import torch

from tests.engine.standin.calls import exported
from tests.engine.standin.enums import torch_type
from tests.engine.standin.quantize import flat, quantized


def _refuse_no_rows(num_rows: int, name: str) -> None:
    if num_rows == 0:
        raise RuntimeError(f"Assertion failed: t.has_data() || t.has_columnwise_data(). {name} is not allocated!")


def _gain(weight: torch.Tensor, zero_centered_gamma: bool) -> torch.Tensor:
    return weight.detach().float() + float(zero_centered_gamma)


def _finish(values: torch.Tensor, otype: int, ln_out: torch.Tensor | None, quantizer: object) -> object:
    values = values.to(torch_type(otype))
    if quantizer is not None:
        return quantized(values, quantizer, ln_out)
    return values if ln_out is None else ln_out.copy_(values)


def _row_gradient(dy: torch.Tensor, normed: torch.Tensor, rsigma: torch.Tensor) -> torch.Tensor:
    """Through ``x * rsigma``, where the mean square of ``normed`` is 1."""
    return rsigma.unsqueeze(-1) * (dy - normed * (dy * normed).mean(-1, keepdim=True))


@exported
def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """[..., h] -> the norm, nothing, and the reciprocal root mean square of each row."""
    rows = flat(input.detach()).float()
    _refuse_no_rows(rows.shape[0], "Output rsigma")
    rsigma = torch.rsqrt(rows.square().mean(-1) + eps)
    values = rows * rsigma.unsqueeze(-1) * _gain(weight, zero_centered_gamma)
    return [_finish(values.view(input.shape), otype, ln_out, quantizer), None, rsigma]


@exported
def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    """Gradients of the rows and the weight."""
    _refuse_no_rows(rsigma.shape[0], "Input rsigma")
    grad, normed = flat(dz).float(), flat(x).float() * rsigma.unsqueeze(-1)
    dx = _row_gradient(grad * _gain(gamma, zero_centered_gamma), normed, rsigma)
    return [dx.view(x.shape).to(x.dtype), (grad * normed).sum(0).to(gamma.dtype)]


@exported
def rmsnorm_bwd_add(dz, x, add, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    """The same with another gradient of the rows added."""
    dx, dgamma = rmsnorm_bwd.__wrapped__(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
    return [(dx.float() + add.float().view(x.shape)).to(x.dtype), dgamma]


@exported
def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """[..., h] -> the norm, and each row's mean and reciprocal standard deviation."""
    rows = flat(input.detach()).float()
    _refuse_no_rows(rows.shape[0], "Output mu")
    mu = rows.mean(-1)
    centred = rows - mu.unsqueeze(-1)
    rsigma = torch.rsqrt(centred.square().mean(-1) + eps)
    values = centred * rsigma.unsqueeze(-1) * _gain(weight, zero_centered_gamma)
    if bias is not None:
        values = values + bias.detach().float()
    return [_finish(values.view(input.shape), otype, ln_out, quantizer), mu, rsigma]


@exported
def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    """Gradients of the rows, the weight and the bias."""
    _refuse_no_rows(rsigma.shape[0], "Input mu")
    grad = flat(dz).float()
    normed = (flat(x).float() - mu.unsqueeze(-1)) * rsigma.unsqueeze(-1)
    dy = grad * _gain(gamma, zero_centered_gamma)
    dx = _row_gradient(dy - dy.mean(-1, keepdim=True), normed, rsigma)
    return [dx.view(x.shape).to(x.dtype), (grad * normed).sum(0).to(gamma.dtype), grad.sum(0).to(gamma.dtype)]
