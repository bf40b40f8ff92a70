"""The search from the papers, one row and every block at a time; of the package it uses module paths only."""

import torch

from cakeflow.models.architecture import Site


def tokenised(tok, request, contexts):
    """Ids, subject's last token and first target token of the request in every context."""
    prompt, end = request.prompt.replace("{}", request.subject), request.prompt.index("{}") + len(request.subject)
    for template in contexts.templates:
        text = f"{template.replace('{}', prompt)} {request.target_new}"
        encoded = tok(text)
        target = encoded.char_to_token(len(text) - len(request.target_new) - 1)  # the space belongs to the target
        yield encoded["input_ids"], encoded.char_to_token(template.index("{}") + end - 1), target


def added(model, modules, ids, at, deltas):
    """Log-probabilities with a vector added to each module's output at one token, and what the modules gave there."""
    seen, handles = {}, []
    for number, module in enumerate(modules):

        def hook(_module, _args, output, number=number):
            value = output[0] if isinstance(output, tuple) else output
            seen[number] = value[0, at].detach()
            value = value + torch.nn.functional.one_hot(torch.tensor(at), len(ids))[None, :, None] * deltas[number]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handles.append(module.register_forward_hook(hook))
    result = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return result, [seen[number] for number in range(len(modules))]


def plain(lm, request, contexts, settings, layer):
    """``compute_z`` (and PMET's ``compute_zs``) from the papers, without anything of the package but module paths."""
    roles = [role for role in (settings.site, settings.extra_site) if role]
    modules = [lm.model.get_submodule(lm.architecture.path(Site(layer, role))) for role in roles]
    rows, essence = list(tokenised(lm.tokenizer, request, contexts)), lm.tokenizer(f"{request.subject} is a")
    essence, last = essence["input_ids"], essence.char_to_token(len(request.subject) - 1)
    deltas = [torch.zeros(48, dtype=torch.float64, requires_grad=True) for _ in modules]
    with torch.no_grad():
        before = added(lm.model, modules, essence, last, deltas)[0][last]
        starts = added(lm.model, modules, *rows[0][:2], deltas)[1]
    adam, factor = torch.optim.Adam(deltas, lr=settings.lr), 1.0
    stop_kl, limit = getattr(settings.stop, "kl", 0.0), getattr(settings.stop, "inner", settings.stop).loss
    for step in range(settings.steps):
        nll, top = 0, True
        for ids, at, target in rows:
            log_probs = added(lm.model, modules, ids, at, deltas)[0][target - 1 : -1]
            wanted = torch.tensor(ids[target:])
            top &= bool((log_probs.argmax(-1) == wanted).all())
            nll = nll + torch.nn.functional.nll_loss(log_probs, wanted) / len(rows)
        now = added(lm.model, modules, essence, last, deltas)[0][last]
        divergence = (now.exp() * (now - before)).sum()
        decay = sum(delta.norm() / start.norm() ** 2 for delta, start in zip(deltas, starts, strict=True))
        loss = factor * nll + settings.essence.factor * divergence + settings.decay.factor * decay
        factor = settings.likelihood.solved_factor if top else 1.0
        done = loss < limit or (top and divergence < stop_kl)
        if done or step == settings.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        for delta, start in zip(deltas, starts, strict=True):
            delta.data *= min(1.0, float(settings.clamp * start.norm() / delta.detach().norm()))
    lm.model.zero_grad()
    return (starts[0] + deltas[0]).detach(), loss.detach(), torch.exp(-nll).detach(), step + 1, bool(done)


def relative(got, want):
    return float((got - want).norm() / want.norm())
