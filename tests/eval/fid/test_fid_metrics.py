"""The scores against closed forms, other libraries, a restatement of ADM's formulas, and the known wrong ways."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.random_inception import write_random_inception

from d_emo.eval.fid.extractors import InceptionExtractor
from d_emo.eval.fid.metrics import (
    Moments,
    MomentSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments_of,
    precision_recall,
)


def rotation(dimension: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.RandomState(seed).randn(dimension, dimension))[0]


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    return write_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="session")
def extractor(inception_weights):
    return InceptionExtractor(str(inception_weights), verify=False).to(torch.device("cpu"))


def noise_images(count: int, seed: int, side: int = 40) -> torch.Tensor:
    """Smooth random colour pictures, uint8 (count, 3, side, side)."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, side, mode="bilinear") * 255).round().to(torch.uint8)


# --- Frechet distance


def test_frechet_distance_equals_the_closed_form_for_commuting_gaussians():
    # Tolerance 1e-10: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2 for covariances with common eigenvectors.
    random, turn = np.random.RandomState(1), rotation(60, 2)
    a, b, difference = random.rand(60) * 3, random.rand(60) * 2, random.randn(60)
    first = Moments(0, difference, (turn * a) @ turn.T)
    second = Moments(0, np.zeros(60), (turn * b) @ turn.T)
    expected = difference @ difference + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_without_full_rank():
    moments = moments_of(np.random.RandomState(3).randn(20, 50))
    assert abs(frechet_distance(moments, moments)) < 1e-10
    # A second set that spans other directions, against the exact value from the two sets' own Gram matrix.
    points = [np.random.RandomState(seed).randn(20, 50) for seed in (3, 4)]
    centred = [(side - side.mean(0)) / np.sqrt(19) for side in points]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((points[0].mean(0) - points[1].mean(0)) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * root
    assert frechet_distance(*map(moments_of, points)) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_equals_adms_matrix_root():
    # ADM: trace(sqrtm(C1 C2)) by SciPy; tolerance 1e-8.
    random = np.random.RandomState(4)
    first, second = random.randn(300, 40) @ random.randn(40, 40), random.randn(200, 40) + 0.3
    mean1, mean2 = first.mean(0), second.mean(0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root.real)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_refuses_nan_and_other_sizes():
    good, other = moments_of(np.eye(4)), moments_of(np.eye(5))
    with pytest.raises(ValueError, match="4 features, the other 5"):
        frechet_distance(good, other)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(good, Moments(4, np.full(4, np.nan), good.covariance))


def test_moments_in_parts_equal_numpys():
    features = np.random.RandomState(5).randn(500, 30).astype(np.float32) + 5
    sums = [MomentSums(30), MomentSums(30)]
    for part, total in zip(np.split(features, [123]), sums, strict=True):
        total.add(part)
    sums[0].count += sums[1].count
    sums[0].total += sums[1].total
    sums[0].products += sums[1].products
    moments = sums[0].moments()
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-11)
    with pytest.raises(ValueError, match="at least 2"):
        moments_of(np.ones((1, 3)))


# --- Inception Score, precision and recall, KID


def adm_inception_score(logits: np.ndarray, chunk: int) -> float:
    """ADM's loop, restated."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    softmax = e / e.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(softmax), chunk):
        part = softmax[start : start + chunk]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores))


def test_inception_score_equals_adms_formula_and_torch_fidelitys():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = np.random.RandomState(6).randn(1000, 20) * 3
    found, spread = inception_score(logits, chunk=100)
    assert found == pytest.approx(adm_inception_score(logits, 100), rel=1e-8)
    library = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    assert found == pytest.approx(library[KEY_METRIC_ISC_MEAN], rel=1e-8)
    assert spread > 0
    # A last chunk that is not full is a chunk of its own, as in ADM's loop.
    assert inception_score(logits[:950], chunk=100)[0] == pytest.approx(
        adm_inception_score(logits[:950], 100), rel=1e-8
    )


def test_samples_sorted_by_class_score_far_too_low():
    labels = np.arange(1000) % 20
    logits = 9.0 * np.eye(20)[labels]
    assert inception_score(logits, chunk=100)[0] > 10
    assert inception_score(logits[np.argsort(labels)], chunk=100)[0] < 4


def adm_precision_recall(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Third neighbours by brute force in float64."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def covered(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, 3]
        return (distances(points, centres) <= radii).any(1).mean()

    return covered(samples, reference), covered(reference, samples)


def test_precision_and_recall_equal_brute_force_and_are_not_swapped():
    random = np.random.RandomState(7)
    reference, samples = random.randn(300, 6), random.randn(200, 6) * 0.6
    expected = adm_precision_recall(reference, samples)
    assert precision_recall(reference, samples) == pytest.approx(expected, abs=1e-8)
    assert expected[0] > expected[1] + 0.1
    with pytest.raises(ValueError, match="3 samples and 300 reference images are too few"):
        precision_recall(reference, samples[:3])


def test_kernel_distance_equals_its_formula():
    random = np.random.RandomState(8)
    x, y = random.randn(90, 12), random.randn(90, 12) + 0.2
    kernel = {name: (a @ b.T / 12 + 1) ** 3 for name, a, b in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    within = sum(kernel[name].sum() - np.trace(kernel[name]) for name in ("xx", "yy")) / (90 * 89)
    expected = within - 2 * kernel["xy"].mean()
    # All 90 images are in every subset, so that the choice does not matter.
    mean, std, size = kernel_distance(x, y)
    assert size == 90 and std < 1e-12
    assert mean == pytest.approx(expected, rel=1e-8)


# --- Inception features


def test_features_and_distance_equal_torchmetrics_without_antialiasing(extractor, inception_weights):
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, drawn = noise_images(12, 0), noise_images(12, 1) // 2
    library = FrechetInceptionDistance(
        feature=2048, antialias=False, feature_extractor_weights_path=str(inception_weights)
    )
    ours = [extractor(images)["pool"] for images in (real, drawn)]
    theirs = library.inception(real[:4])
    # The order of memory differs, so rounding does; tolerance 1e-5 of the features' size.
    torch.testing.assert_close(ours[0][:4], theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)

    class Features(torch.nn.Identity):
        """Hands features on: eight of them, whose covariance 12 images determine."""

        num_features = 8

    few = [features[:, :8].double() for features in ours]
    library = FrechetInceptionDistance(feature=Features())
    library.set_dtype(torch.float64)
    library.update(few[0], real=True)
    library.update(few[1], real=False)
    sides = [moments_of(features.numpy()) for features in few]
    assert frechet_distance(*sides) == pytest.approx(float(library.compute()), rel=1e-6)

    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [{"mu": side.mean, "sigma": side.covariance} for side in sides]
    assert frechet_distance(*sides) == pytest.approx(
        fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID], rel=1e-6
    )


def test_antialiased_resizing_gives_other_features(extractor, inception_weights):
    from torchmetrics.image.fid import NoTrainInceptionV3

    images = noise_images(4, 2, side=400)
    images = images ^ (torch.arange(400) % 2 * 64).to(torch.uint8)  # fine stripes, which the two resizings treat apart
    wrong = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
    wrong.use_antialias = True
    right = extractor(images)["pool"]
    difference = (wrong(images) - right).norm() / right.norm()
    assert difference > 1e-2


def test_spatial_features_have_adms_layout(extractor):
    images = noise_images(2, 3)
    seen = {}
    handle = extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.update(right=a[2].clone()))
    other = extractor.network.Mixed_6e.branch1x1.register_forward_hook(lambda *a: seen.update(wrong=a[2].clone()))
    spatial = extractor(images)["spatial"]
    handle.remove()
    other.remove()
    assert spatial.shape == (2, 17 * 17 * 7)
    branch = seen["right"]  # (n, 192, 17, 17)
    expected = torch.stack([branch[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], dim=1)
    torch.testing.assert_close(spatial, expected, atol=0, rtol=0)
    assert (spatial - branch[:, :7].flatten(1)).abs().max() > 1e-2
    assert (spatial - seen["wrong"][:, :7].permute(0, 2, 3, 1).flatten(1)).abs().max() > 1e-2


def test_logits_are_the_pooled_features_times_the_weights_without_the_bias(extractor):
    features = extractor(noise_images(3, 4))
    head = extractor.network.fc
    torch.testing.assert_close(features["logits"], features["pool"] @ head.weight.T, atol=1e-4, rtol=1e-5)
    assert (head.bias.abs().max() > 1e-3) and features["logits"].shape == (3, 1008)


def test_features_depend_on_the_batch_by_rounding_only(extractor):
    images = noise_images(5, 5)
    together, alone = extractor(images)["pool"], extractor(images[3:4])["pool"]
    torch.testing.assert_close(together[3:4], alone, atol=1e-4, rtol=1e-4)


def test_truncation_moves_half_of_the_pixels():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = ((values / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (torch.floor(127.5 * values + 128) == rounded).float().mean() > 0.999  # DiT's way is rounding
    assert 0.45 < ((values / 2 + 0.5).clamp(0, 1) * 255).floor().ne(rounded).float().mean() < 0.55
