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
"""Options that a trainer's configuration does not have."""

from dataclasses import fields


def unknown_option(config_class: type, name: str) -> str:
    """What to say of an option that a config does not have, and which configs of this package do."""
    from . import trainer  # all of the configs, which derive from the one of this file

    configs = [getattr(trainer, known) for known in trainer.__all__ if known.endswith("Config")]
    configs = [one for one in configs if not one.__subclasses__()]  # what others share is no trainer's
    owners = [one.__name__ for one in configs if name in {known.name for known in fields(one)}]
    has = f"It is an option of {' and '.join(sorted(owners))}." if owners else "No config of this package has it."
    return f"{config_class.__name__} has no {name!r}. {has}"
