"""Small npm packages for tests, written instead of downloaded."""

import io
import json
import tarfile


def write_package(path, files):
    """An npm archive of JSON files: name -> content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
