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

"""The text that a prompt asks an image to show: what stands in quotation marks. It needs none of the reward's packages."""

import re
import unicodedata


_QUOTED = re.compile('["“”„]([^"“”„]*)["“”]')


def quoted_text(prompt: str) -> str | None:
    """The text between the first two quotation marks of a prompt, straight or curly; `None` if there are none."""
    match = _QUOTED.search(prompt)
    return match[1] if match else None


def folded(text: str) -> str:
    """The text without case, spaces and accents, for comparing."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not (c.isspace() or unicodedata.combining(c)))


def why_no_target(prompt: str) -> str | None:
    """Says why a prompt has no text to look for; `None` if it has one."""
    target = quoted_text(prompt)
    if target is None:
        return 'it quotes no text to look for; write it as in: a sign that says "OPEN"'
    return None if folded(target) else "there is nothing between its first two quotation marks"
