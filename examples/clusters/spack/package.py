from spack.package import depends_on, license, variant, version
from spack_repo.builtin.build_systems.python import PythonPackage


class PyExtrapcomm(PythonPackage):
    """Data-parallel optimizer steps as one collective: reduce, update, extrapolate and gather in a single pass."""

    homepage = "file:///opt/extrapcomm"
    git = "file:///opt/extrapcomm"  # where your clone lies
    license("BSD-3-Clause")

    version("main", branch="main")

    variant(
        "torch", default=True, description="The optimizers for PyTorch, beside the engine for NumPy arrays"
    )

    depends_on("cxx", type="build")
    depends_on("python@3.10:", type=("build", "link", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-pybind11@2.11:", type="build")
    depends_on("cmake@3.20:", type="build")
    depends_on("ninja", type="build")
    depends_on("mpi", type=("build", "link", "run"))
    depends_on("py-mpi4py@3.1:", type=("build", "run"))
    depends_on("py-numpy@1.23:", type=("build", "run"))
    depends_on("py-torch@2.4:", type=("build", "run"), when="+torch")

    def setup_build_environment(self, env):
        env.prepend_path("PATH", self.spec["mpi"].prefix.bin)  # for the wire between hosts: mpicxx
