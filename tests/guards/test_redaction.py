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

"""Secrets of other names and services stay out of what is shown, ordinary values stay in; a stranger's text is short and on one line."""

import random
import string
import time

import pytest

from trl_diffusion_opd.guards.redaction import public_name, public_value, shown, visible
from trl_diffusion_opd.guards.secret_text import SECRET, is_secret_name, without_secrets


random.seed(0)


def made_up(length: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.choices(letters, k=length - 1)) + "7"


TOKENS = {
    "hf_": made_up(34),
    "api_org_": made_up(34),
    "sk-": made_up(48),
    "sk-proj-": f"{made_up(20)}_{made_up(20)}-{made_up(30)}",
    "sk-ant-api03-": made_up(90),
    "sk-or-v1-": made_up(64, string.hexdigits),
    "sk_live_": made_up(24),
    "ghp_": made_up(36),
    "gho_": made_up(36),
    "ghs_": made_up(36),
    "github_pat_": f"{made_up(22)}_{made_up(59)}",
    "glpat-": made_up(20),
    "xoxb-": "1234567890-" + made_up(24),
    "xoxp-": "1234567890-" + made_up(24),
    "AKIA": "IOSFODNN7EXAMPLE",
    "ASIA": "IOSFODNN7EXAMPLE",
    "AIza": made_up(35),
    "npm_": made_up(36),
    "pypi-": made_up(100),
    "eyJ": f"{made_up(20)}.eyJ{made_up(40)}.{made_up(43)}",
}


class TestSecrets:
    @pytest.mark.parametrize("start", TOKENS)
    @pytest.mark.parametrize(
        "around", ["{}", "a {} b", "x={}&y=1", '{{"a": "{}"}}', "({}),", "https://x.example/{}/y"]
    )
    def test_tokens_wherever_they_are_written(self, start, around):
        token = start + TOKENS[start]
        assert public_value(around.format(token)) == around.format(SECRET)
        assert public_value({token: [token]}) == {SECRET: [SECRET]}

    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("https://x.example/a?sv=1&sig=a%2Fb%3D&se=2", "https://x.example/a?sv=1&sig=<secret>&se=2"),
            ("https://b.example/k?X-Amz-Signature=ab12&n=1", "https://b.example/k?X-Amz-Signature=<secret>&n=1"),
            ("https://b.example/k?X-Amz-Security-Token=ab12", "https://b.example/k?X-Amz-Security-Token=<secret>"),
            ("b.example/?apikey=ab12#access_token=cd34", "b.example/?apikey=<secret>#access_token=<secret>"),
            ("https://anna:p@ss@x.example/?q=1", "https://x.example/?q=1"),
            ("aws_secret_access_key=wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key=<secret>"),
            ("AWS_SESSION_TOKEN=FwoGZXIvYXdzEBY region=eu", "AWS_SESSION_TOKEN=<secret> region=eu"),
            ("--api-key=abc --n=3", "--api-key=<secret> --n=3"),
            ('{"password": "open sesame", "n": 3}', '{"password": "<secret>", "n": 3}'),
            ("{'privateKey': 'abc'}", "{'privateKey': '<secret>'}"),
            ("Authorization: Basic YW5uYTpwYXNz", "Authorization: Basic <secret>"),
            ("authorization: abc.def", "authorization: <secret>"),
            ("curl -H 'Bearer abcdef123456'", "curl -H 'Bearer <secret>'"),
            ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- x", "<secret> x"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl", "<secret>"),
        ],
    )
    def test_urls_assignments_and_headers(self, text, left):
        assert public_value(text) == left

    @pytest.mark.parametrize(
        "name",
        (
            "sig signature aws_secret_access_key aws_session_token aws_access_key_id AWS-SECRET-ACCESS-KEY apikey api_key apiKey "
            "X-Api-Key private_key privateKey password passwd db_pwd passphrase secret client_secret hub_token Authorization "
            "Proxy-Authorization cookie credentials basic_auth basicAuth ssh-key signing_key account_key connectionString jwt"
        ).split(),
    )
    def test_names(self, name):
        assert is_secret_name(name) and public_value({"a": {name: "x", "n": 1}}) == {"a": {"n": 1}}

    @pytest.mark.parametrize(
        "name",
        "design sigma noise_sig_level keys key_weights image_key prompt_key tokens max_tokens token_ids author authors bypass "
        "passes monkey signal secretary n_tokens_seen cookies_on_a_plate".split(),
    )
    def test_ordinary_names(self, name):
        assert not is_secret_name(name) and public_value({name: "x"}) == {name: "x"}

    @pytest.mark.parametrize(
        "text",
        [
            "task-12",
            "sketch",
            "a sk- 12 sign, a risk-averse-and-otherwise-careful-17 desk-lamp-with-12-arms-and-more",
            "sk-sketching-style-of-old-masters",
            "a bearer of internationalization and 12 bearers",
            'the password: "open 12 doors", a basic understanding of authorization',
            "a key=board and sigma=0.5, design=flat",
            "https://x.example/a?sigma=3&design=2&author=me&size=3",
            "the word AKIA, GHP_, xoxo-xoxo-xoxo-xoxo, eyJ, hf_hub",
            "me/student@main",
            "0123456789abcdef0123456789abcdef01234567",
            "sha256:" + "feed" * 16,
            "attn.to_out.0,attn.add_k_proj",
            "betas=0.9, eps=1e-8",
        ],
    )
    def test_ordinary_values_are_left_alone(self, text):
        assert public_value(text) == text and public_value({"a": [text]}) == {"a": [text]}

    @pytest.mark.parametrize(
        "text",
        [
            "-sk-",
            "sk-" + "a",
            "?token",
            "&key",
            "bearer ",
            "authorization: ",
            "eyJ" + "a" * 9 + ".",
            "-eyJaaaaaaaa",
            "://",
            "a",
            "'a': '",
        ],
    )
    def test_it_ends(self, text):
        start = time.perf_counter()
        without_secrets(text * (10**5 // len(text)))
        assert time.perf_counter() - start < 2


class TestShown:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("plain é 字 👩\u200d🚀\u3000x", "plain é 字 👩\u200d🚀\u3000x"),
            ("a\nb\r\tc", r"a\nb\r\tc"),
            ("\x1b[31m\x07\x9b2J\x7f\x00", r"\x1b[31m\x07\x9b2J\x7f\x00"),
            ("\u202egpj\u2066\u200f\u2028", r"\u202egpj\u2066\u200f\u2028"),
            ("\ud800", r"\ud800"),
            (b"\xff\x1bA", "\ufffd\\x1bA"),
            (ValueError("a\nb"), r"a\nb"),
        ],
    )
    def test_it_is_on_one_line(self, text, line):
        assert shown(text) == line

    def test_it_has_both_ends(self):
        text = "transformer_blocks.0." + "x" * 10**5 + ".lora_A.weight"
        assert len(shown(text)) == 200 and len(shown(text, 50)) == 50
        assert (
            shown(text).startswith("transformer_blocks.0.x")
            and shown(text).endswith("x.lora_A.weight")
            and "x…x" in shown(text)
        )
        assert shown("x" * 200) == "x" * 200
        assert len(shown("\x1b" * 150)) == 200  # longer when it is shown
        assert shown(b"a" * 10**5 + b"z").endswith("az") and len(shown(b"a" * 10**5)) == 200

    def test_what_is_kept(self):
        assert visible("a\n\x1bb\t", keep="\n\t") == "a\n\\x1bb\t"


def test_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert public_name("owner/repo") == "owner/repo"
    assert public_name("runs/a") == public_name(str(tmp_path / "runs" / "a" / "")) == "a"
    assert public_name(".") == tmp_path.name
    assert public_name(None) is None
