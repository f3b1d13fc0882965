"""Step headers say what they were made of, and fit where the plan makes room for them."""

from dataclasses import fields

from raygraft import SamplingParams
from raygraft.actors.batch import Chunk
from raygraft.actors.header import header_of, step_of
from raygraft.actors.part import MAX_LOGIT_BIAS, control_bytes
from raygraft.actors.records import decode, encode_into
from raygraft.actors.request import GeneratedSequence
from raygraft.graph.capability import Limits

PLACE = {"epoch": 3, "step": 7, "half_batch": 1, "half_batches": 2}


def sequence(ids, params, pages=()):
    made = GeneratedSequence(0, ids, params)
    made.pages.extend(pages)
    return made


def test_a_header_says_what_it_was_made_of():
    drawn = SamplingParams(
        temperature=0.5, top_k=-1, top_p=0.25, min_p=0.125, seed=2**62, logprobs=4,
        repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2, repeat_last_n=3,
    )  # fmt: skip
    biased = SamplingParams(temperature=0, top_k=9, seed=1, logit_bias={5: 1.5, 6: -2.5})
    chunks = [
        Chunk(sequence([1, 2, 3, 4, 5], drawn, [7, 8]), 3, 2, 1),
        Chunk(sequence([9, 8, 7], biased, [4]), 0, 2, 0),
        Chunk(sequence([6], biased, [5]), 0, 1, 1),
    ]
    header = header_of(chunks, **PLACE)
    assert (header.epoch, header.step, header.half_batch, header.transfer) == (3, 7, 1, 2)
    step = step_of(header)
    own = {f.name: getattr(step, f.name).tolist() for f in fields(step) if f.name != "sampling"}
    assert own == {
        "tokens": [4, 5, 9, 8, 6],
        "positions": [3, 4, 0, 1, 0],
        "sequence": [0, 0, 1, 1, 2],
        "block_tables": [[7, 8], [4, -1], [5, -1]],
        "logit_rows": [1, 4],
    }
    sampling = {f.name: getattr(step.sampling, f.name).tolist() for f in fields(step.sampling)}
    assert sampling == {
        "temperature": [0.5, 0],
        "top_p": [0.25, 1],
        "min_p": [0.125, 0],
        "repeat_penalty": [1.5, 1],
        "presence_penalty": [-1, 0],
        "frequency_penalty": [2, 0],
        "top_k": [0, 9],
        "logprobs": [4, 0],
        "seed": [2**62, 1],
        "stream": [0, 0],
        "position": [5, 1],
        "history_start": [0, 3, 3],
        "history": [3, 4, 5],
        "bias_start": [0, 0, 2],
        "bias_ids": [5, 6],
        "bias_values": [1.5, -2.5],
    }


def test_a_header_without_chunks_has_nothing_to_do():
    assert step_of(header_of((), **PLACE)) is None


def test_the_largest_header_fits():
    limits = Limits(max_rows=24, context=64, cache_type="f32", max_sequences=3)
    params = SamplingParams(
        repetition_penalty=2, repeat_last_n=-1, logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)
    )
    chunks = [Chunk(sequence([1] * 64, params, range(4)), 56, 8, 1) for _ in range(3)]
    buffer = memoryview(bytearray(control_bytes(limits, 16)))
    encode_into(header_of(chunks, **PLACE), buffer)
    assert step_of(decode(buffer)).rows == 24
