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
    z, ((loss, nll),), steps, done = plain_jointly(lm, [request], contexts, settings, layer)
    return z, loss, torch.exp(-nll), steps, done


def plain_jointly(lm, requests, contexts, settings, layer):
    """The same for several facts about one subject at the start of their prompts, with one vector for all of them."""
    roles = [role for role in (settings.site, settings.extra_site) if role]
    modules = [lm.model.get_submodule(lm.architecture.path(Site(layer, role))) for role in roles]
    facts, essence = [list(tokenised(lm.tokenizer, each, contexts)) for each in requests], f"{requests[0].subject} is a"
    essence = lm.tokenizer(essence)
    essence, last = essence["input_ids"], essence.char_to_token(len(requests[0].subject) - 1)
    deltas = [torch.zeros(48, dtype=torch.float64, requires_grad=True) for _ in modules]
    with torch.no_grad():
        before = added(lm.model, modules, essence, last, deltas)[0][last]
        starts = added(lm.model, modules, *facts[0][0][:2], deltas)[1]
    adam, factors = torch.optim.Adam(deltas, lr=settings.lr, betas=settings.betas), [1.0 for _ in facts]
    if settings.stride is not None:
        adam = ByFact(
            deltas, [settings.stride * settings.clamp * float(start.norm()) for start in starts], settings.betas
        )
    hits, times = [0 for _ in facts], getattr(settings.stop, "times", settings.steps + 1)
    first = 1 if settings.likelihood.solved_in == "sampled" else 0
    stop_kl, limit = getattr(settings.stop, "kl", 0.0), getattr(settings.stop, "inner", settings.stop).loss
    for step in range(settings.steps):
        now = added(lm.model, modules, essence, last, deltas)[0][last]
        divergence = (now.exp() * (now - before)).sum()
        decay = sum(delta.norm() / start.norm() ** 2 for delta, start in zip(deltas, starts, strict=True))
        losses, done = [], True
        for number, rows in enumerate(facts):
            nll, top = likelihood(lm, modules, rows, deltas, first)
            loss = factors[number] * nll + settings.essence.factor * divergence + settings.decay.factor * decay
            losses.append((loss, nll))
            factors[number] = settings.likelihood.solved_factor if top else 1.0
            hits[number] += top
            done &= bool(loss < limit or (top and divergence < stop_kl) or hits[number] >= times)
        if done or step == settings.steps - 1:
            break
        adam.zero_grad()
        sum(loss for loss, _ in losses).backward()
        adam.step()
        for delta, start in zip(deltas, starts, strict=True):
            delta.data *= min(1.0, float(settings.clamp * start.norm() / delta.detach().norm()))
    lm.model.zero_grad()
    return (starts[0] + deltas[0]).detach(), [(a.detach(), b.detach()) for a, b in losses], step + 1, done


class ByFact:
    """Adam whose mean square is one number per vector, that of the gradient's length."""

    def __init__(self, deltas, lengths, betas):
        self.deltas, self.lengths, self.betas, self.past = deltas, lengths, betas, []

    def zero_grad(self):
        for delta in self.deltas:
            delta.grad = None

    def step(self):
        self.past.append([delta.grad.clone() for delta in self.deltas])
        last = len(self.past) - 1
        weights = [[(1 - beta) * beta ** (last - i) for i in range(last + 1)] for beta in self.betas]
        for number, (delta, length) in enumerate(zip(self.deltas, self.lengths, strict=True)):
            gradients = [each[number] for each in self.past]
            mean = sum(w * g for w, g in zip(weights[0], gradients, strict=True)) / sum(weights[0])
            square = sum(w * g.norm() ** 2 for w, g in zip(weights[1], gradients, strict=True)) / sum(weights[1])
            delta.data -= length * mean / square.sqrt()


def likelihood(lm, modules, rows, deltas, first=0):
    """Mean NLL of the target over the contexts, and True if from ``first`` on all its tokens are most likely."""
    nll, top = 0, True
    for place, (ids, at, target) in enumerate(rows):
        log_probs = added(lm.model, modules, ids, at, deltas)[0][target - 1 : -1]
        expected = torch.tensor(ids[target:])
        top &= bool((log_probs.argmax(-1) == expected).all()) or place < first
        nll = nll + torch.nn.functional.nll_loss(log_probs, expected) / len(rows)
    return nll, top


def relative(got, want):
    return float((got - want).norm() / want.norm())
