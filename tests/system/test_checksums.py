"""Checksums find every flipped bit, a missing file and a wrong size, and name the file."""

import xxhash

from fastpo.system.checksums import Checksum, checksum, first_difference, folder_checksums


def _folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 20_000)  # more than one block
    (tmp_path / "inner" / "b.txt").write_bytes(b"x")
    return folder_checksums(tmp_path)


def test_the_checksum_is_xxh3_of_the_whole_content(tmp_path):
    recorded = _folder(tmp_path)
    content = (tmp_path / "a.bin").read_bytes()
    expected = Checksum(bytes=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))
    assert recorded == {"a.bin": expected, "inner/b.txt": checksum(tmp_path / "inner" / "b.txt")}
    # XXH3's own test vector for no input with seed 0.
    (tmp_path / "empty").touch()
    assert checksum(tmp_path / "empty").xxh3 == "99aa06d3014798d86001c324468d497f"


def test_a_folder_as_recorded_has_no_difference(tmp_path):
    recorded = _folder(tmp_path)
    (tmp_path / "not-recorded").write_text("anything")
    assert first_difference(tmp_path, recorded) is None


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    recorded = _folder(tmp_path)
    file = tmp_path / "a.bin"
    whole = file.read_bytes()
    for place in (0, 1 << 22, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        found = first_difference(tmp_path, recorded)
        assert found and str(file) in found and "is damaged" in found


def test_a_missing_and_a_shortened_file_are_named(tmp_path):
    recorded = _folder(tmp_path)
    (tmp_path / "inner" / "b.txt").write_bytes(b"")
    assert first_difference(tmp_path, recorded) == (
        f"{tmp_path / 'inner' / 'b.txt'} has 0 bytes, expected 1"
    )
    (tmp_path / "inner" / "b.txt").unlink()
    assert "b.txt is missing" in first_difference(tmp_path, recorded)
