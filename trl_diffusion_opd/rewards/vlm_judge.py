# Copyright 2026 The trl-diffusion-opd Authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A vision language model as a judge, behind any endpoint with OpenAI's chat completions."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from PIL.Image import Image

from ..guards.redaction import shown
from .base import Row, source_pictures
from .chat import ChatReward, first_choice, number_pattern
from .server_calls import (
    JSONServer,
    OnError,
    RemoteRewardError,
    address_hash,
    call_problems,
    png_url,
    token_problems,
    url_problems,
)


TEMPLATE = (
    "A model was given this instruction:\n{prompt}\n\n"
    "Judge the picture after 'Result:'. If there are source pictures, the instruction says what to make of them: the "
    "result must follow it and leave everything else as it was in the sources. If there are none, the result must show "
    "what the instruction describes. Mind defects, too.\n"
    "Give a number from {lowest} (failed) to {highest} (perfect). Give your reasons in at most three sentences, then end "
    "with a line of the form\nScore: <number>"
)
PARAMETERS: Mapping[str, object] = {"temperature": 0, "max_tokens": 1024}
_PATH = "/chat/completions"
_OWN_FIELDS = ("model", "messages", "stream", "n")
_ANSWER_BYTES = 2**20

# "Score: 7", "**Score:** 7/10", '{"score": 7}', "score is 7 out of 10". The last one counts.
_SCORE = re.compile(
    rf"""\bscore\b (?:\s*+\([^)\n]{{0,100}}+\))?+ (?:\s++is\b)?+ [\s:=*_`\["']*+ {number_pattern("[-−+]?+")} (?!\s*+%)""",
    re.IGNORECASE | re.VERBOSE,
)
# A number with which an answer ends: "8", "Rating: 8/10", "I give it an 8." Not the end of "4,5", "7-8" or "1 – 10".
_LAST = re.compile(
    rf"""(?<!\d[,.:–−-]) (?<!\d[,.:–−-][ ]) (?<!\d[ ][–−-]) (?<!\d[ ][–−-][ ])
        {number_pattern("[-−+]?+")} [^\w%]*+ \Z""",
    re.IGNORECASE | re.VERBOSE,
)
_LAST_CHARACTERS = 1000


class VLMJudge(ChatReward):
    """
    Asks a vision language model for a score, at any endpoint with OpenAI's chat completions (vLLM, SGLang, OpenAI and
    others). No client library is needed.

    One message has the instruction, then the row's source pictures (column `source_images`), if there are any, each
    after the words "Source picture 1:", and last the picture that is judged, after "Result:". Pictures are PNGs in
    `data:` URLs. So one judge serves edits and text-to-image.

    The score is the number after the last "Score:" of the answer, or else the number with which the answer ends. It is
    returned as a share of the scale: `(number - lowest) / (highest - lowest)`, from 0 to 1. An answer that was cut off,
    without such a number, or with one outside the scale, is a failure like a server that does not answer: it raises an
    error or gives no score, but never a score of 0.

    Failed or broken connections, timeouts and the statuses 408, 429, 500, 502, 503 and 504 are tried again, as by
    [`RemoteReward`]. Answers of more than 1 MiB and compressed answers are refused. Redirects are not followed.

    Args:
        url (`str`): the endpoint's address, including `/v1`, such as `"http://localhost:8000/v1"`. It must not contain
            a user, password or query, since it is logged.
        model (`str`): the endpoint's name of the model.
        template (`str`, *optional*): the instruction, with `{prompt}` in place of the prompt. `{lowest}` and
            `{highest}` are the ends of the scale. Ask for "Score: <number>".
        scale (`tuple[float, float]`, *optional*, defaults to `(1, 10)`): the lowest and the highest number that the
            judge may answer.
        name (`str`, *optional*, defaults to `"vlm_judge"`): name of the metric. Several judges need different names.
        parameters (`dict`, *optional*): further fields of the request. Defaults to
            `{"temperature": 0, "max_tokens": 1024}`, which it replaces: some models want `max_completion_tokens`.
        token_env (`str`, *optional*): name of an environment variable with the API key, sent as
            `Authorization: Bearer …`.
        max_concurrency (`int`, *optional*, defaults to `16`): maximum number of simultaneous requests.
        timeout (`float`, *optional*, defaults to `120`): maximum seconds of a try, from the connection to the answer's
            last byte.
        max_retries (`int`, *optional*, defaults to `3`): number of tries after the first one.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` an error, or log a warning and give the sample
            no score (`"none"`).

    Raises:
        [`ValueError`]: if an argument is invalid.
        [`RemoteRewardError`]: by a call that failed.
    """

    name = "vlm_judge"
    bounds = (0.0, 1.0)

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        scale: Sequence[float] = (1, 10),
        name: str = "vlm_judge",
        parameters: Mapping[str, Any] | None = None,
        token_env: str | None = None,
        max_concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 3,
        on_error: OnError = "raise",
    ):
        super().__init__(max_concurrency, on_error)
        parameters = dict(PARAMETERS if parameters is None else parameters)
        problems = url_problems("url", url) + call_problems(timeout, max_retries, on_error)
        problems += _question_problems(template, scale, parameters)
        if token_env is not None:
            problems += token_problems(token_env)
        if max_concurrency < 1:
            problems.append(f"max_concurrency={max_concurrency}: it must be at least 1.")
        if problems:
            raise ValueError("\n".join(f"Reward {name!r}: {problem}" for problem in problems))
        self.name = name
        self.url = url.rstrip("/").removesuffix(_PATH)
        self.model = model
        self.template = template
        self.lowest, self.highest = scale
        self.parameters = parameters
        self._server = JSONServer(name, self.url + _PATH, timeout, max_retries, _ANSWER_BYTES, token_env)

    @property
    def fingerprint(self) -> str:
        question = json.dumps([self.template, self.lowest, self.highest, self.parameters], sort_keys=True)
        hashed = hashlib.sha256(question.encode()).hexdigest()[:16]
        return f"{self.name}:{address_hash(self.url)}:{self.model}:{hashed}"

    def _ask(self, prompt: str, image: Image, row: Row) -> float:
        message = {"role": "user", "content": self._content(prompt, image, row)}
        data = json.dumps({**self.parameters, "model": self.model, "messages": [message]})
        whose = f"Reward {self.name!r}: model {self.model!r} at {self.url} "
        value = self._server.ask(whose, data, partial(self._read, prompt))
        return (value - self.lowest) / (self.highest - self.lowest)

    def _content(self, prompt: str, image: Image, row: Row) -> list[dict[str, object]]:
        # Not format(), since a prompt may contain braces. The prompt last, so that its own braces stay.
        question = self.template.replace("{lowest}", f"{self.lowest:g}").replace("{highest}", f"{self.highest:g}")
        pictures = [
            *((f"Source picture {n}:", picture.convert("RGB")) for n, picture in enumerate(source_pictures(row), 1)),
            ("Result:", image),
        ]
        content: list[dict[str, object]] = [{"type": "text", "text": question.replace("{prompt}", prompt)}]
        for label, picture in pictures:
            content += [
                {"type": "text", "text": label},
                {"type": "image_url", "image_url": {"url": png_url(picture)}},
            ]
        return content

    def _read(self, prompt: str, whose: str, content: bytes) -> float:
        """The number of an answer. Raises `RemoteRewardError` if it has none; the caller catches other errors."""
        try:
            text, is_cut = first_choice(content)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RemoteRewardError(
                f"{whose}gave no completion for the prompt '{shown(prompt)}' ({type(error).__name__}: "
                f"{shown(error)}): '{shown(content)}'"
            ) from error
        value = None if is_cut else judged_number(text, self.highest)
        said = f" for the prompt '{shown(prompt)}': '{shown(text[-400:])}'"
        scale = f"from {self.lowest:g} to {self.highest:g}"
        if is_cut:
            raise RemoteRewardError(f"{whose}gave an answer that was cut off (see `parameters`){said}")
        if value is None:
            raise RemoteRewardError(f"{whose}answered no number {scale} after 'Score:' or at the end{said}")
        if not self.lowest <= value <= self.highest:
            raise RemoteRewardError(f"{whose}answered {value:g}, which is not {scale},{said}")
        return value


def judged_number(answer: str, highest: float) -> float | None:
    """
    The number after the last "score" of an answer, or else the one with which it ends. `None` if there is neither, or
    if the answer names another scale, as in "4/5" for a scale to 10.
    """
    found = list(_SCORE.finditer(answer))
    if not found:
        line = answer.rstrip().rpartition("\n")[2][-_LAST_CHARACTERS:]
        found = list(_LAST.finditer(line))
    if not found:
        return None
    value, scale = found[-1].groups()
    return float(value.replace("−", "-")) if scale is None or float(scale) == highest else None


def _is_scale(scale: object) -> bool:
    if not isinstance(scale, list | tuple) or len(scale) != 2:
        return False
    finite = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in scale)
    return finite and scale[0] < scale[1]


def _question_problems(template: str, scale: Sequence[float], parameters: Mapping[str, Any]) -> list[str]:
    """Says what is wrong with what is asked, one sentence each."""
    problems = []
    if "{prompt}" not in template:
        problems.append(f"template={shown(repr(template))} has no {{prompt}}, where the prompt belongs.")
    if not _is_scale(scale):
        problems.append(f"scale={scale!r}: it must be two numbers, the lowest and the highest, such as [1, 10].")
    if own := [field for field in _OWN_FIELDS if field in parameters]:
        problems.append(f"parameters has {own}, which this reward sets itself.")
    try:
        json.dumps(parameters)
    except (TypeError, ValueError) as error:
        problems.append(f"parameters cannot be sent as JSON: {shown(error)}.")
    return problems
