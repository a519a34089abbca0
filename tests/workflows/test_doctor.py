"""What `doctor` finds, and that it says how to fix what is missing."""

import torch

import mvar_core as mvar


def test_it_examines_the_machine():
    findings = {finding.name: finding for finding in mvar.doctor().findings}
    assert {"python", "torch", "device", "natten", "torch-fidelity", "inception weights", "cache"} <= findings.keys()
    assert findings["torch"].ok
    assert torch.__version__ in findings["torch"].found
    assert "dense" in findings["attention"].found


def test_a_cache_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "file" / "cache"))
    finding = next(finding for finding in mvar.doctor().findings if finding.name == "cache")
    assert not finding.ok
    assert str(tmp_path) in finding.found


def test_missing_files_are_named_with_a_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("MVAR_VGG_WEIGHTS", raising=False)
    finding = next(finding for finding in mvar.doctor().findings if finding.name == "perceptual weights")
    assert not finding.ok
    assert finding.fix
    assert "vgg16-397923af.pth" in finding.fix
