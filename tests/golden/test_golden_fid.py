"""Frechet distance and Inception Score from recorded features and logits."""

from golden_cases import approx, for_cases

from metrics.fid import FeatureSums, frechet_distance, inception_score


@for_cases("image", holding="fid")
def test_frechet_distance(case):
    """Of two sets, and of one with itself."""
    real = FeatureSums.of(case["real_features"])
    generated = FeatureSums.of(case["generated_features"])
    values = case.values
    distance = frechet_distance(real, generated)
    for name in ("fid", "fid_float32_features"):
        assert distance == approx(values[name], case.tolerance(name))
    name = "fid_of_a_set_with_itself"
    limits = case.tolerance(name)
    assert frechet_distance(real, real) == approx(values[name], limits)


@for_cases("image", holding="fid_fewer_samples_than_features")
def test_fewer_images_than_features(case):
    """All real images and the first few generated ones; the case does not say how many,
    only that they are fewer than there are features."""
    name = "fid_fewer_samples_than_features"
    golden = approx(case.values[name], case.tolerance(name))
    generated, width = case["generated_features"], case["real_features"].shape[1]
    real = FeatureSums.of(case["real_features"])
    found = [
        frechet_distance(real, FeatureSums.of(generated[:count]))
        for count in range(2, width)
    ]
    assert any(distance == golden for distance in found)


@for_cases("image", holding="permutation")
def test_inception_score(case):
    """Of permuted logits, over splits as uneven as those of the case."""
    values, order = case.values, case["permutation"]
    sizes = [len(part) for part in order.chunk(values["splits"])]
    assert sizes == values["split_sizes"]
    found = inception_score(case["logits"], order, values["splits"])
    for ours, name in zip(
        found, ("inception_score_mean", "inception_score_std"), strict=True
    ):
        assert ours == approx(values[name], case.tolerance(name))
