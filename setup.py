"""What pyproject.toml cannot say: the C++ extension, and a package whose sources lie elsewhere."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

# The Triton sources are installed as stars_fast.kernels: another wheel owns the import name triton_kernels.
kernels = "stars_fast.kernels"

# No -march=native: a wheel runs on every machine of its architecture, and the kernels choose by themselves.
# No contraction to fused multiply-add: the draw must round alike everywhere, so that a seed gives the same text. Only
# attention, whose logits differ from machine to machine anyway, switches it on for itself.
extension = Pybind11Extension(
    "stars_fast._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread", "-ffp-contract=off"],
    extra_link_args=["-pthread"],
)

with ParallelCompile(default=0):
    setup(
        packages=["stars_fast", *find_packages(include=["stars_fast.*"]), kernels],
        package_dir={"stars_fast": "stars_fast", kernels: "triton_kernels"},
        include_package_data=False,  # what is in the sdist for building is not all meant for installing
        package_data={
            "stars_fast": [
                "py.typed",
                "*.pyi",
                *(f"report/trace_page/page.{end}" for end in ("html", "css", "js")),
                *(f"demo/**/*.{end}" for end in ("safetensors", "json", "jinja", "md")),
            ]
        },
        ext_modules=[extension],
        cmdclass={"build_ext": build_ext},
        zip_safe=False,
    )
