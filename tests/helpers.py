"""Scripted episodes, for tests of what is made of trajectories, and what they are compared with."""

import torch

from rollout import Chat, Transcript


def plain_logprobs(model, ids, temperature=1.0):
    """Log-probs of ids[1:] by one forward pass without a cache."""
    ids = torch.as_tensor(ids, device=model.device)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].float().cpu()


def assert_logprobs_are_those_of_a_plain_forward_pass(model, played, atol=2e-5, temperature=1.0):
    for row, n in enumerate(played.lengths.tolist()):
        mask, expected = played.response_mask[row, 1:n], plain_logprobs(model, played.ids[row, :n], temperature)
        torch.testing.assert_close(played.logprobs[row, 1:n][mask], expected[mask], atol=atol, rtol=0)


def respond(transcript, tokenizer, answer, stop=None):
    """Give a text as the response, or what a function of the environment says -> whether the episode goes on."""
    ids = tokenizer(answer if isinstance(answer, str) else answer(transcript.env)).input_ids
    ids.append(tokenizer.eos_token_id if stop is None else stop)
    return transcript.respond(ids, [-1.0] * len(ids))


def scripted(tokenizer, env, seed, answers, kind=Transcript, stop=None):
    """The transcript of an episode in which these answers were given, up to its end."""
    transcript = kind(Chat(tokenizer, env.system_prompt, () if stop is None else (stop,)), env, seed, 10**6, 100)
    for answer in answers:
        if not respond(transcript, tokenizer, answer, stop):
            break
    return transcript
