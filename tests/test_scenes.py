"""Scenes: what is drawn agrees with what is said, on every machine state and in any order."""

import pickle

import cv2
import numpy as np
import pytest

from ssljax.data.scenes import (
    CLASSES,
    COLORS,
    N_TEMPLATES,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scenes,
    caption,
    held_out,
    prompts,
)


def objects_of(record):
    return [Object(*row) for row in record["attributes"].tolist()]


def test_a_sample_depends_on_seed_split_and_index_alone():
    scenes = Scenes(objects=2)
    forwards = [scenes[i] for i in range(6)]
    for i in (5, 0, 3):
        again = pickle.loads(pickle.dumps(scenes))[i]
        assert again.keys() == forwards[i].keys()
        for key in again:
            np.testing.assert_array_equal(again[key], forwards[i][key])
    others = [Scenes(objects=2, seed=1)[0], Scenes(objects=2, split="test")[0], Scenes(objects=2, split="all")[0]]
    assert all((other["image"] != forwards[0]["image"]).any() for other in others)
    # a longer set begins with the shorter one
    np.testing.assert_array_equal(Scenes(count=7)[6]["image"], Scenes(count=9_999)[6]["image"])


def test_shapes_and_types():
    record = Scenes(count=3, size=48, objects=4)[-1]
    assert (record["image"].dtype, record["image"].shape) == (np.uint8, (48, 48, 3))
    assert (record["mask"].dtype, record["mask"].shape) == (np.uint8, (48, 48))
    assert (record["keypoints"].dtype, record["keypoints"].shape) == (np.float32, (4, 2))
    assert (record["attributes"].dtype, record["attributes"].shape) == (np.int32, (4, 5))
    assert isinstance(record["text"], str)
    assert CLASSES[record["label"]] == Scenes().classes[record["label"]]
    with pytest.raises(IndexError):
        Scenes(count=3)[3]


def test_held_out_combinations_never_occur_in_training_and_are_all_of_the_test():
    seen = {"train": set(), "test": set()}
    for scenes, combinations in ((Scenes(split="train"), seen["train"]), (Scenes(split="test"), seen["test"])):
        for record in map(scenes._draw_objects, map(np.random.default_rng, range(3_000))):
            combinations |= {(o.shape, o.color, o.place) for o in record}
    assert not seen["train"] & seen["test"]
    every = {(s, c, p) for s in range(6) for c in range(8) for p in range(9)}
    assert seen["test"] == {combination for combination in every if held_out(*combination)}
    assert seen["train"] == every - seen["test"]
    assert len(seen["test"]) == 72
    # training shows every pair, so only the composition is new
    for a, b, sizes in ((0, 1, 48), (0, 2, 54), (1, 2, 72)):
        assert len({(combination[a], combination[b]) for combination in seen["train"]}) == sizes


def test_without_holdout_the_splits_show_everything():
    draws = [Scenes(split="train", holdout=False)._draw_objects(np.random.default_rng(i))[0] for i in range(2_000)]
    assert any(held_out(o.shape, o.color, o.place) for o in draws)
    assert {o.texture for o in draws} == {0, 1, 2}
    assert {o.size for o in draws} == {0, 1, 2}


def test_the_picture_shows_what_the_attributes_say():
    for record in map(Scenes(count=300, size=64, split="all").__getitem__, range(300)):
        (o,) = objects_of(record)
        inside = record["mask"] == 1
        rows, columns = np.nonzero(inside)
        # place: the centre of what is drawn, in thirds of the picture
        place = int(rows.mean() // (64 / 3)) * 3 + int(columns.mean() // (64 / 3))
        assert PLACES[place] == PLACES[o.place]
        # keypoint: within a pixel of the middle of the drawn pixels (0, 0 is the corner of the picture)
        np.testing.assert_allclose(record["keypoints"][0], (columns.mean() + 0.5, rows.mean() + 0.5), atol=1.0)
        # size: the extent grows with the radius
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        radius = list(SIZES.values())[o.size] * 64
        assert 1.2 * radius < extent < 2.2 * radius
        # colour: of the plain ones, the nearest named colour
        if o.texture == 0:
            mean = record["image"][cv2.erode(inside.astype(np.uint8), np.ones((3, 3))).astype(bool)].mean(0)
            distances = np.linalg.norm(np.array(list(COLORS.values())) - mean, axis=1)
            assert distances.argmin() == o.color, record["text"]
        assert record["label"] == o.shape * 8 + o.color
        assert CLASSES[record["label"]] == f"{list(COLORS)[o.color]} {SHAPES[o.shape]}"


def test_drawn_areas_match_geometry():
    """Areas of the masks against closed forms, averaged over positions and angles."""
    area = {"circle": np.pi * 0.9**2, "square": 2.0, "triangle": 3 * np.sqrt(3) / 4, "ring": np.pi * (0.9**2 - 0.48**2)}
    # star: 10 triangles between radii 1 and 0.42; cross: a square and four arms
    area |= {"star": 10 * 0.5 * 0.42 * np.sin(np.pi / 5), "cross": 4 * (2 * 0.34 * 0.94) - 4 * 0.34**2}
    ratios = {name: [] for name in SHAPES}
    for record in map(Scenes(count=240, size=256, split="all").__getitem__, range(240)):
        (o,) = objects_of(record)
        expected = area[SHAPES[o.shape]] * (list(SIZES.values())[o.size] * 256) ** 2
        ratios[SHAPES[o.shape]].append((record["mask"] == 1).sum() / expected)
    for name, values in ratios.items():
        assert abs(np.mean(values) - 1) < 0.06, (name, np.mean(values))  # the radius itself varies by 7 %


def test_textures_darken_a_part_of_the_object():
    spread = {texture: [] for texture in TEXTURES}
    for record in map(Scenes(count=200, size=64, split="all").__getitem__, range(200)):
        (o,) = objects_of(record)
        inside = cv2.erode((record["mask"] == 1).astype(np.uint8), np.ones((3, 3))).astype(bool)
        if o.size:
            spread[TEXTURES[o.texture]].append(record["image"][inside].mean(-1).std())
    assert max(spread["plain"]) < min(spread["striped"] + spread["dotted"])


def test_several_objects_have_their_own_places_and_masks():
    for i in range(30):
        record = Scenes(objects=5, size=64)[i]
        objects = objects_of(record)
        assert len({o.place for o in objects}) == 5
        assert set(np.unique(record["mask"])) == {0, 1, 2, 3, 4, 5}
        assert record["label"] == objects[0].label
        for o in objects:
            assert f"{list(COLORS)[o.color]} {SHAPES[o.shape]}" in record["text"]


def test_captions():
    red_circle = Object(shape=0, color=0, size=0, place=0, texture=0)
    blue_star = Object(shape=3, color=5, size=2, place=7, texture=1)
    orange_ring = Object(shape=5, color=1, size=1, place=4, texture=0)
    assert caption([red_circle]) == "a small red circle in the top left"
    assert caption([red_circle, blue_star]) == (
        "a small red circle in the top left and a large striped blue star at the bottom"
    )
    assert caption([orange_ring], 2) == "there is an orange ring in the middle"
    three = caption([red_circle, orange_ring, blue_star], 2)
    assert three.startswith("there are a small red circle in the top left, an orange ring in the middle and a large")
    assert len({caption([red_circle], t) for t in range(N_TEMPLATES)}) == N_TEMPLATES
    texts = {Scenes(paraphrase=False)[i]["text"].split()[0] for i in range(40)}
    assert texts <= {"a", "an"}


def test_prompts_name_each_class_alone():
    assert len(prompts()) == len(CLASSES) == 48
    for name, texts in zip(CLASSES, prompts(), strict=True):
        assert all(name in text for text in texts)
    assert prompts()[CLASSES.index("orange star")][0] == "an orange star"
    flat = [text for texts in prompts() for text in texts]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"objects": 10}, "1 to 9"), ({"split": "val"}, "'train', 'test' or 'all'"), ({"size": 8}, "size >= 16")],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Scenes(**options)
