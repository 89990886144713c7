"""A stand-in in plain torch with the contract of FlashAttention's varlen form."""

import torch

from aki.attention import varlen

CALLS: list[bool] = []


def sequences(query_edges, key_edges, longest_query, longest_key):
    """Slices of each sequence; the arguments' own contract is checked on the way."""
    assert query_edges.dtype == key_edges.dtype == torch.int32
    assert query_edges.is_contiguous()
    assert len(query_edges) == len(key_edges) > 1
    cuts = [torch.stack([edges[:-1], edges[1:]], 1).tolist() for edges in (query_edges, key_edges)]
    # No sequence is empty, and with a causal mask none has fewer keys than queries.
    assert all(start < stop for side in cuts for start, stop in side)
    assert longest_query == max(stop - start for start, stop in cuts[0])
    assert longest_key == max(stop - start for start, stop in cuts[1])
    return [(slice(*q), slice(*k)) for q, k in zip(*cuts, strict=True)]


def scores(query, key, is_causal, scale):
    """(heads, queries, keys); a causal mask is aligned to the bottom right."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    if not is_causal:
        return found
    queries, keys = found.shape[1:]
    assert keys >= queries
    return found.masked_fill(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)


def forward(query, key, value, *rest):
    *edges, is_causal, scale = rest
    CALLS.append(is_causal)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    out = torch.full_like(query, torch.nan)
    lse = torch.full((query.shape[1], query.shape[0]), torch.nan)
    groups = query.shape[1] // key.shape[1]
    for q, k in sequences(*edges):
        found = scores(query[q], key[k], is_causal, scale)
        lse[:, q] = found.logsumexp(-1)
        weights = found.softmax(-1)
        out[q] = torch.einsum("hqk,khd->qhd", weights, value[k].float().repeat_interleave(groups, 1)).to(out)
    return out, lse


def backward(grad, query, key, value, out, lse, *rest):
    """By the formulas, from the log-sum-exp that is passed: dv = p'do, ds = p (do v' - do.o), dq = ds k, dk = ds'q."""
    *edges, is_causal, scale = rest
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[1], query.shape[0])
    gradients = [torch.zeros_like(x) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for q, k in sequences(*edges):
        own, do = query[q].float(), grad[q].float()
        seen, values = (x[k].float().repeat_interleave(groups, 1) for x in (key, value))
        weights = (scores(query[q], key[k], is_causal, scale) - lse[:, q, None]).exp()
        pulled = torch.einsum("qhd,khd->hqk", do, values) - (do * out[q].float()).sum(-1).T[..., None]
        shares = weights * pulled * scale
        per_key = torch.einsum("hqk,qhd->khd", shares, own), torch.einsum("hqk,qhd->khd", weights, do)
        gradients[0][q] = torch.einsum("hqk,khd->qhd", shares, seen).to(query)
        for gradient, share in zip(gradients[1:], per_key, strict=True):
            gradient[k] = share.unflatten(1, (-1, groups)).sum(2).to(key)
    return tuple(gradients)


KERNEL = varlen.Kernel(forward, backward)
