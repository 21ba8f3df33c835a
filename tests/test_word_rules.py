"""Which rewards of a run rest on word rules, by its settings and tasks."""

from dataclasses import replace

import pytest

from cosmo_rl.cpgd.config import DataConfig
from cosmo_rl.cpgd.rewards.word_rules import by_words
from cosmo_rl.cpgd.run.recipes import recipe

SAFETY, JAILBREAK, HELPFUL = "Task-Aware of safety rows", "Task-Aware of jailbreak rows", (
    "Helpful of all rows that are not unsafe")
AT = "=http://127.0.0.1:1,m"


@pytest.mark.parametrize(("tasks", "judges", "reward", "told"), [
    (("safety", "math"), (), {}, [SAFETY, HELPFUL]), (("math", "mcq"), (), {}, [HELPFUL]),
    (("safety", "jailbreak"), (), {}, ["Task-Aware of safety and jailbreak rows", HELPFUL]),
    (("jailbreak",), ("helpful",), {}, [JAILBREAK]), (("safety",), ("helpful", "safework_safety"), {}, []),
    (("safety",), ("llama_guard_4",), {}, [HELPFUL]), (("safety",), ("scalar",), {}, [SAFETY]),
    (("safety",), ("qwen3guard", "scalar"), {"safety": "hybrid"}, [HELPFUL]),
    (("safety",), ("helpful",), {"safety": "safegrpo"}, [f"{SAFETY} (SafeGRPO's: does the answer refuse?)"]),
    (("safety",), (), {"helpful": 0.0}, [SAFETY]), (("safety",), (), {"task_aware": 0.0}, [HELPFUL]),
    (("safety",), ("general", "visual_focus"), {"helpful": 0.0}, [SAFETY]),
])
def test_by_settings(tasks, judges, reward, told):
    base = recipe("7b", 2)
    config = replace(base, reward=replace(base.reward, judges=tuple(name + AT for name in judges), **reward))
    assert by_words(config, tasks) == told


def test_only_free_text_is_meant():
    tasks = ("safety", "general")
    assert by_words(recipe("tiny", 2), tasks) == [] and by_words(recipe("7b", 0), tasks) == []
    assert by_words(replace(recipe("tiny", 2), data=DataConfig(path=("rows.jsonl",))), tasks) == [SAFETY, HELPFUL]
