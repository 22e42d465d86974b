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

"""UnifiedReward: asks a vision language model for a score."""

import hashlib
import os
import re

from PIL.Image import Image

from ..guards.redaction import shown
from .base import Row
from .bounded_client import BoundedClient, RefusedAnswerError
from .chat import ANSWER_BYTES, TOKEN_BYTES, ChatReward, first_choice, number_pattern
from .server_calls import (
    OnError,
    RemoteRewardError,
    address_hash,
    call_problems,
    png_url,
    status_shown,
    token_problems,
    url_problems,
)


# The form that the model was trained with: a caption, two criteria, and a score from 1 to 5 after "Final Score:".
QUESTION = (
    "This image was generated from a text caption. Judge it by two criteria:\n"
    "1. Alignment with the Caption: are the objects of the caption there, with the attributes and relations that it "
    "gives them?\n"
    "2. Overall Image Quality: is the image clear and detailed, are its colors right, does it please the eye?\n"
    "Considering both, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Text Caption: [{prompt}]"
)

# Matches "Final Score: 3.5", also with Markdown around it, "(1-5)" before or "/5" after the number.
_FINAL_SCORE = re.compile(
    rf"final\s++score (?:\s*+\([^)\n]{{0,100}}+\))?+ (?:\s++is\b)?+ [\s:=*_`\[]*+ {number_pattern()}",
    re.IGNORECASE | re.VERBOSE,
)
_LOWEST, _HIGHEST = 1.0, 5.0


class UnifiedReward(ChatReward):
    """
    UnifiedReward's point score ([Wang et al., 2025](https://huggingface.co/papers/2503.05236)): a vision language
    model judges how well an image fits its caption and how good it looks, from 1 to 5. Published tables have 3.0 to
    3.5.

    The model is served by vLLM, SGLang or anything else with OpenAI's chat completions, for example:

    ```bash
    vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8000
    OPENAI_API_KEY=none OPENAI_BASE_URL=http://localhost:8000/v1 python ...
    ```

    The model is asked at temperature 0. The key is read only from the environment variable `OPENAI_API_KEY`, so that
    it is in no argument. A server that checks no key accepts any value. Answers without a score from 1 to 5, and those
    cut off at `max_tokens`, are failures: they raise an error or give no score, but never a score of 0.

    Answers of more than 64 KiB plus 64 bytes a token and compressed answers are refused. Redirects are not followed.

    Args:
        base_url (`str`, *optional*): address of the endpoint, including `/v1`. Defaults to the environment variable
            `OPENAI_BASE_URL`.
        model (`str`, *optional*, defaults to `"CodeGoat24/UnifiedReward-7b-v1.5"`): the endpoint's name of the model.
        question (`str`, *optional*): the question for the model, with `{prompt}` in place of the caption. The default
            has the published form, but other words. To compare with published numbers, give the wording that belongs
            to the model.
        max_tokens (`int`, *optional*, defaults to `1024`): maximum number of tokens of an answer.
        max_concurrency (`int`, *optional*, defaults to `16`): maximum number of simultaneous requests.
        timeout (`float`, *optional*, defaults to `120`): maximum seconds of a try, from the connection to the answer's
            last byte.
        max_retries (`int`, *optional*, defaults to `3`): number of tries after the first one. The client decides which
            errors are tried again.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` an error, or log a warning and give the sample
            no score (`"none"`).

    Raises:
        [`ImportError`]: if the client is not installed: `pip install ".[unifiedreward]"` in a checkout.
        [`ValueError`]: if an argument is invalid, or there is no key.
        [`RemoteRewardError`]: by a call that failed.
    """

    name = "unifiedreward"
    bounds = (_LOWEST, _HIGHEST)

    def __init__(
        self,
        base_url: str | None = None,
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        question: str = QUESTION,
        max_tokens: int = 1024,
        max_concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 3,
        on_error: OnError = "raise",
    ):
        super().__init__(max_concurrency, on_error)
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "Reward 'unifiedreward' needs the openai client. Install it with `pip install \".[unifiedreward]\"` in a "
                "checkout of trl-diffusion-opd."
            ) from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        problems = call_problems(timeout, max_retries, on_error)
        if base_url is None:
            problems.append(
                'no endpoint. Give base_url, on the command line --reward_kwargs \'{"unifiedreward": {"base_url": '
                '"http://localhost:8000/v1"}}\', or set OPENAI_BASE_URL.'
            )
        else:
            problems += url_problems("base_url", base_url)
        if not os.environ.get("OPENAI_API_KEY"):
            problems.append(
                "the environment variable OPENAI_API_KEY is not set. A server that checks no key takes any value."
            )
        else:
            problems += token_problems("OPENAI_API_KEY")
        if "{prompt}" not in question:
            problems.append(f"question={question!r} has no {{prompt}}, where the caption belongs.")
        for option, value in (("max_tokens", max_tokens), ("max_concurrency", max_concurrency)):
            if value < 1:
                problems.append(f"{option}={value}: it must be at least 1.")
        if problems:
            raise ValueError("\n".join(f"Reward 'unifiedreward': {problem}" for problem in problems))
        self.base_url = str(base_url)
        self.model = model
        self.question = question
        self.max_tokens = max_tokens
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=self.base_url,
            timeout=timeout,
            max_retries=max_retries,
            http_client=BoundedClient(timeout, ANSWER_BYTES + TOKEN_BYTES * max_tokens),
        )

    @property
    def fingerprint(self) -> str:
        question = hashlib.sha256(self.question.encode()).hexdigest()[:16]
        return f"{self.name}:{address_hash(self.base_url)}:{self.model}:{question}:{self.max_tokens}"

    def _ask(self, prompt: str, image: Image, row: Row) -> float:
        failed = f"Reward {self.name!r}: model {self.model!r} at {self.base_url} "
        content = [
            {"type": "image_url", "image_url": {"url": png_url(image)}},
            # Not format(), since a caption may contain braces.
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        answer = b""
        try:
            # The raw answer, since the client would make an object of every entry of any JSON that comes, without
            # checks.
            answer = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],  # type: ignore[misc,list-item]
                max_tokens=self.max_tokens,
                temperature=0,
            ).content
            text, is_cut = first_choice(answer)
            score = None if is_cut else parse_score(text)
        except self._openai.APIStatusError as error:
            # Without the cause, which would repeat the server's page unchanged.
            raise RemoteRewardError(f"{failed}cannot be asked: it {status_shown(error.response)}") from None
        except self._openai.OpenAIError as error:
            reason = "" if error.__cause__ is None else f" ({shown(error.__cause__)})"
            raise RemoteRewardError(f"{failed}cannot be asked: {error}{reason}") from error
        except RefusedAnswerError as error:
            raise RemoteRewardError(f"{failed}gave {error}.") from error
        except Exception as error:  # an untrusted answer may cause any error
            raise RemoteRewardError(
                f"{failed}gave no completion for the prompt '{shown(prompt)}' ({type(error).__name__}: "
                f"{shown(error)}): '{shown(answer)}'"
            ) from error
        if score is None:
            cut = f", cut off at max_tokens={self.max_tokens}," if is_cut else ""
            raise RemoteRewardError(
                f"{failed}answered{cut} without a score from 1 to 5 after 'Final Score:' for the prompt "
                f"'{shown(prompt)}': '{shown(text[-200:])}'"
            )
        return score


def parse_score(answer: str) -> float | None:
    """The last "Final Score" of an answer; `None` if there is none, or it is not from 1 to 5."""
    found = list(_FINAL_SCORE.finditer(answer))
    if not found:
        return None
    value, scale = float(found[-1][1]), found[-1][2]
    return value if _LOWEST <= value <= _HIGHEST and scale in (None, "5") else None
