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

"""Recognises secrets, by the name of an entry or by the form of a text, and replaces them."""

import re


SECRET = "<secret>"

# Endings of names of secrets, in lower case and without separators between words.
_ENDS = (
    *("token", "secret", "secrets", "password", "passwd", "passphrase", "authorization", "cookie"),
    *("credential", "credentials", "signature", "connectionstring"),
    *(
        f"{kind}key"
        for kind in ("api", "access", "account", "auth", "encryption", "private", "secret", "signing", "ssh")
    ),
    *("accesskeyid", "secretkeyid"),
)
# These count only as whole words, since harmless words end like them: "design", "bypass".
_WORDS = ("sig", "auth", "pwd", "pass", "jwt")
_BETWEEN_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")

# Forms of well-known services' tokens. Where ordinary words could match, a digit is required. Every lookahead is
# bounded, since a text may have a million characters.
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"
    r"|api_org_[A-Za-z0-9]{20,}"
    r"|sk-(?=[A-Za-z_-]{0,100}\d)[A-Za-z0-9_-]{16,}"
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|gh[oprsu]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_.-]{16,}"
    r"|xox[a-z]-(?=[A-Za-z-]{0,100}\d)[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|AIza[A-Za-z0-9_-]{35}"
    r"|npm_[A-Za-z0-9]{36}"
    r"|pypi-[A-Za-z0-9_-]{50,}"
    r"|eyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]*"
    r")"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_HEADER = re.compile(
    r"\b(authorization[\"']?\s{0,9}[:=]\s{0,9}[\"']?(?:[A-Za-z]{1,20}[ \t]{1,9})?)[^\s\"',;]+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer\s{1,9})(?=[A-Za-z._~+/=-]{0,200}\d)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/\s?#]*@")
_URL_QUERY = re.compile(
    r"([?&#;](?:[^=&#;\s]{0,64}?(?:token|key|secret|passw|signature|credential)[^=&#;\s]{0,64}|sig|auth|pwd|pass|jwt)=)[^&#;\s]+",
    re.IGNORECASE,
)
# name=value, and "name": "value" as in JSON and Python.
_ASSIGNED = re.compile(r"(?<![\w-])([\w-]{2,64})(=)([^\s\"'&,;<>]+)")
_QUOTED = re.compile(r"([\"'])([\w-]{2,64})(\1\s{0,9}:\s{0,9})([\"'])([^\"']+)")


def is_secret_name(name: str) -> bool:
    """
    Whether an entry with this name holds a secret, such as `hub_token`, `apiKey`, `AWS_SECRET_ACCESS_KEY` or `sig`.
    """
    words = _BETWEEN_WORDS.sub(" ", name[-200:]).lower().split()
    return bool(words) and ("".join(words).endswith(_ENDS) or words[-1] in _WORDS)


def without_secrets(text: str) -> str:
    """
    Replaces secrets in a text by `<secret>`: tokens of known services, private keys, authorization headers,
    credentials in URLs, and values assigned to the name of a secret.
    """
    text = _PRIVATE_KEY.sub(SECRET, text)
    text = _URL_QUERY.sub(rf"\1{SECRET}", _URL_USER.sub("", text))
    text = _TOKENS.sub(SECRET, text)
    text = _BEARER.sub(rf"\1{SECRET}", _HEADER.sub(rf"\1{SECRET}", text))
    text = _ASSIGNED.sub(lambda m: f"{m[1]}{m[2]}{SECRET}" if is_secret_name(m[1]) else m[0], text)
    return _QUOTED.sub(lambda m: f"{m[1]}{m[2]}{m[3]}{m[4]}{SECRET}" if is_secret_name(m[2]) else m[0], text)
