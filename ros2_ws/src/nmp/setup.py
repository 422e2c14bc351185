from glob import glob

from setuptools import find_packages, setup

PACKAGE = "nmp"

setup(
    name=PACKAGE,
    version="0.1.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={
        PACKAGE: [
            "py.typed",
            "weights/*.safetensors",
            "weights/*.json",
            "config/*.yaml",
            "config/*.xml",
            "prior/*.html",
            "view/*.html",
            "view/*.json",
        ]
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", sorted(glob("launch/*.launch.py"))),
        (f"share/{PACKAGE}/rviz", sorted(glob("rviz/*.rviz"))),
        (f"share/{PACKAGE}/config", sorted(glob(f"{PACKAGE}/config/*"))),
    ],
    install_requires=["setuptools"],
    zip_safe=False,
    maintainer="nmp maintainers",
    maintainer_email="maintainers@example.com",
    description="An online neural map: six cameras and a pose in, semantic map layers and a lasting city map out.",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "mapping_node = nmp.nodes.mapping_node:main",
            "mapping_supervisor = nmp.nodes.supervisor:main",
            "player_node = nmp.nodes.player_node:main",
            "recorder_node = nmp.nodes.recorder_node:main",
        ],
    },
)
