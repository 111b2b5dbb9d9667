"""Pools and routes: what a file may say, which route a request takes, what a pool can do and what that costs."""

from pathlib import Path
from typing import Any

import pytest

from img2img.errors import ConfigurationError
from img2img.images import PictureInfo
from img2img.pools import Pool, Pools, RequestClass, Route, class_of
from img2img.requests import JobOptions, Parameters

TEXT, IMAGE, MASKED = RequestClass
POOL = '[[pools]]\nname = "gpu"\nengine = "diffusion"\n'
ROUTE = '[[routes]]\npools = ["gpu"]\n'
FOR_CATS = '[[routes]]\npools = ["gpu"]\nmodel = "cats"\n'
COMPLETE = """
[[pools]]
name = "gpu"
engine = "diffusion"
model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
max_queued = 500

[[pools]]
name = "cpu"
engine = "diffusion"
max_steps = 8
max_pixels = 262_144
start_seconds = 0

[[pools]]
name = "burst"
engine = "cloudflare"
job_price = 0.001
step_price = 0.0001
spend_per_day = 20
tenant_spend_per_day = 5.0

[[routes]]
model = "@cf/acme/cats"
pools = ["gpu"]

[[routes]]
classes = ["text-to-image", "image-to-image"]
pools = ["gpu", "cpu", "burst"]
max_wait = 20

[[routes]]
classes = ["inpainting"]
pools = ["gpu", "cpu"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pools.toml"


def loaded(path: Path, content: str) -> Pools:
    path.write_text(content)
    return Pools.load(path)


def info(width: int = 64, height: int = 64) -> PictureInfo:
    return PictureInfo("PNG", width, height, 100, "ab" * 32)


def asked(**fields: Any) -> Parameters:
    return Parameters(prompt="a lion", **fields)


def pool(**fields: Any) -> Pool:
    return Pool(**{"name": "gpu", "engine": "diffusion"} | fields)


class TestFile:
    def test_a_complete_file_is_read(self, path: Path) -> None:
        pools = loaded(path, COMPLETE)
        assert list(pools.by_name) == ["gpu", "cpu", "burst"]
        gpu, cpu, burst = pools.by_name.values()
        assert (gpu.model, gpu.max_queued, gpu.start_seconds) == (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            500,
            30,
        )
        assert (cpu.max_steps, cpu.max_pixels, cpu.start_seconds) == (8, 512 * 512, 0)
        assert (burst.job_price, burst.spend_per_day, burst.tenant_spend_per_day) == (0.001, 20, 5)
        assert pools.models == ("@cf/acme/cats",)
        assert pools.route(None, TEXT) == Route(pools=("gpu", "cpu", "burst"), classes=(TEXT, IMAGE), max_wait=20)

    @pytest.mark.parametrize(
        ("content", "where", "reason"),
        [
            ("", "", "missing required field `pools`"),
            (POOL, "", "missing required field `routes`"),
            ("pools = []\n" + ROUTE, "$.pools", "length >= 1"),
            ("routes = []\n" + POOL, "$.routes", "length >= 1"),
            ("[[pools]", "", "is not TOML"),
            (POOL + ROUTE + "x = 1", "$.routes[0]", "unknown field `x`"),
            (POOL + "queue = 1\n" + ROUTE, "$.pools[0]", "unknown field `queue`"),
            ('[[pools]]\nname = "gpu"\n' + ROUTE, "$.pools[0]", "missing required field `engine`"),
            ('[[pools]]\nengine = "fake"\n' + ROUTE, "$.pools[0]", "missing required field `name`"),
            (POOL.replace("diffusion", "auto") + ROUTE, "$.pools[0].engine", "Invalid enum value 'auto'"),
            (POOL + "external = 1\n" + ROUTE, "$.pools[0].external", "Expected `bool"),
            (POOL + "max_queued = 0\n" + ROUTE, "$.pools[0].max_queued", "Expected `int` >= 1"),
            (POOL + "max_steps = 2.5\n" + ROUTE, "$.pools[0].max_steps", "got `float`"),
            (POOL + "max_pixels = -1\n" + ROUTE, "$.pools[0].max_pixels", "Expected `int` >= 1"),
            (POOL + "start_seconds = -1\n" + ROUTE, "$.pools[0].start_seconds", "Expected `float` >= 0"),
            (POOL + "job_price = nan\n" + ROUTE, "$.pools[0].job_price", "Expected `float` >= 0"),
            (POOL + "step_price = inf\n" + ROUTE, "$.pools[0].step_price", "Expected `float` <= 1000000000"),
            (POOL + "spend_per_day = -0.1\n" + ROUTE, "$.pools[0].spend_per_day", "Expected `float` >= 0"),
            (POOL + "[[routes]]\npools = []\n", "$.routes[0].pools", "length >= 1"),
            (POOL + ROUTE + "max_wait = 1e9\n", "$.routes[0].max_wait", "Expected `float` <= 86400"),
            (POOL + ROUTE + "classes = []\n", "$.routes[0].classes", "length >= 1"),
            (POOL + ROUTE + 'classes = ["upscaling"]\n', "$.routes[0].classes[0]", "Invalid enum value 'upscaling'"),
        ],
    )
    def test_what_has_not_the_form_of_such_a_file_is_refused(
        self, path: Path, content: str, where: str, reason: str
    ) -> None:
        """With the file, the entry and the field; the remedy is in the documentation of the form."""
        with pytest.raises(ConfigurationError) as caught:
            loaded(path, content)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert reason in message
        assert where in message
        assert message.endswith("see docs/pools.md")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                POOL.replace("gpu", "my gpu") + ROUTE,
                "pool 'my gpu': a name has 1 to 64 letters, digits, '-' and '_': rename it",
            ),
            (POOL.replace("gpu", "g" * 65) + ROUTE, f"pool '{'g' * 65}': a name has 1 to 64 letters"),
            (POOL + POOL + ROUTE, "pool 'gpu' is there twice: rename or remove one of them"),
            (
                POOL + "job_price = 0.1\n" + ROUTE,
                "pool 'gpu' costs money: say with tenant_spend_per_day how much a tenant may spend",
            ),
            (POOL + "step_price = 0.1\nspend_per_day = 9\n" + ROUTE, "pool 'gpu' costs money"),
            (POOL + "spend_per_day = 9\n" + ROUTE, "pool 'gpu' has a cap and no price: give job_price or step_price"),
            (POOL + "tenant_spend_per_day = 0\n" + ROUTE, "pool 'gpu' has a cap and no price"),
            (
                POOL + "calls_per_minute = 60\n" + ROUTE,
                "pool 'gpu' has calls_per_minute and its engine calls no upstream",
            ),
            (
                POOL + ROUTE + FOR_CATS.replace("cats", "two cats"),
                "route 2: a model's name has 1 to 128 visible ASCII characters, no '/' first or last: rename it",
            ),
            (POOL + ROUTE + FOR_CATS.replace("cats", "c" * 129), "route 2: a model's name has 1 to 128"),
            (POOL + ROUTE + FOR_CATS.replace("cats", ""), "route 2: a model's name has 1 to 128"),
            (POOL + ROUTE + FOR_CATS.replace("cats", "/cats"), "route 2: a model's name has 1 to 128"),
            (
                POOL + ROUTE + ROUTE.replace("gpu", "cpu"),
                "route 2 names the pool 'cpu', which is not in the file: add or rename it",
            ),
            (POOL + ROUTE.replace('"gpu"', '"gpu", "gpu"'), "route 1 names a pool twice: remove one of the two"),
            (POOL + FOR_CATS, "has no route without a model for text-to-image: add one, or leave its classes out"),
            (
                POOL + ROUTE + 'classes = ["text-to-image", "image-to-image"]\n',
                "has no route without a model for inpainting: add one",
            ),
            (
                POOL + ROUTE + FOR_CATS + 'classes = ["inpainting"]\n',
                "has no route for 'cats' for text-to-image: add one, or leave its classes out",
            ),
        ],
    )
    def test_what_contradicts_itself_is_refused_with_the_entry_and_a_remedy(
        self, path: Path, content: str, message: str
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            loaded(path, content)
        assert str(caught.value).startswith(str(path))
        assert message in str(caught.value)

    @pytest.mark.parametrize("name", ["missing.toml", "."])
    def test_a_file_that_cannot_be_read_is_refused_with_its_setting(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigurationError, match="IMG2IMG_POOLS_FILE") as caught:
            Pools.load(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))

    def test_bytes_that_are_no_text_are_refused(self, path: Path) -> None:
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigurationError, match="is not TOML"):
            Pools.load(path)

    def test_the_example_of_the_documentation_is_a_sound_file(self, path: Path) -> None:
        document = (Path(__file__).parents[2] / "docs" / "pools.md").read_text()
        example = document.partition("```toml\n")[2].partition("```")[0]
        pools = loaded(path, example)
        assert {engine.engine for engine in pools.by_name.values()} == {"diffusion", "cloudflare"}
        assert pools.models


class TestRoutes:
    @pytest.mark.parametrize(
        ("model", "kind", "first", "count"),
        [
            (None, TEXT, "gpu", 3),
            (None, IMAGE, "gpu", 3),
            (None, MASKED, "gpu", 2),
            ("@cf/acme/cats", TEXT, "gpu", 1),
            ("@cf/acme/cats", MASKED, "gpu", 1),
        ],
    )
    def test_a_request_takes_the_route_of_its_model_and_class(
        self, path: Path, model: str | None, kind: RequestClass, first: str, count: int
    ) -> None:
        route = loaded(path, COMPLETE).route(model, kind)
        assert route is not None
        assert (route.pools[0], len(route.pools)) == (first, count)

    def test_an_unknown_model_has_no_route(self, path: Path) -> None:
        """It does not fall back to the routes without a model."""
        assert loaded(path, COMPLETE).route("@cf/acme/dogs", TEXT) is None

    def test_the_first_route_that_fits_counts(self) -> None:
        special, general = Route(pools=("cpu",), classes=(MASKED,)), Route(pools=("gpu",))
        assert Pools([], [special, general]).route(None, MASKED) is special
        assert Pools([], [special, general]).route(None, TEXT) is general
        assert Pools([], [general, special]).route(None, MASKED) is general

    def test_a_model_of_several_routes_is_named_once(self) -> None:
        routes = [Route(pools=("gpu",), model=model) for model in ("b", None, "a", "b")]
        assert Pools([], routes).models == ("b", "a")

    @pytest.mark.parametrize(
        ("engine", "kind"),
        [("auto", "diffusion"), ("diffusion", "diffusion"), ("cloudflare", "cloudflare"), ("fake", "fake")],
    )
    def test_without_a_file_one_pool_takes_everything(self, engine: str, kind: str) -> None:
        pools = Pools.single("default", engine)
        assert [(one.name, one.engine) for one in pools.by_name.values()] == [("default", kind)]
        assert all(pools.route(None, kind) == Route(pools=("default",)) for kind in RequestClass)
        assert pools.models == ()
        assert pools.by_name["default"].why_not(asked(width=2048, height=2048), JobOptions(priority=3)) is None


@pytest.mark.parametrize(
    ("pictures", "kind"),
    [({}, TEXT), ({"image": info()}, IMAGE), ({"image": info(), "mask": info()}, MASKED)],
)
def test_the_pictures_of_a_request_are_its_class(pictures: dict[str, Any], kind: RequestClass) -> None:
    assert class_of(asked(**pictures)) is kind


@pytest.mark.parametrize(
    ("fields", "external"),
    [
        ({}, False),
        ({"engine": "fake"}, False),
        ({"engine": "cloudflare"}, True),
        ({"engine": "cloudflare", "external": False}, False),
        ({"external": True}, True),
    ],
)
def test_a_pool_is_outside_if_it_calls_cloudflare_or_says_so(fields: dict[str, Any], external: bool) -> None:
    assert pool(**fields).is_external is external


class TestPrice:
    @pytest.mark.parametrize(
        ("fields", "units"),
        [
            ({"width": 512, "height": 512}, 20),
            ({"width": 1024, "height": 512}, 40),
            ({"width": 256, "height": 256, "num_steps": 4}, 1),
            ({}, 20),
            ({"image": info(64, 64)}, 20),
            ({"image": info(64, 64), "strength": 0.5}, 10),
            ({"strength": 0.5}, 20),
            ({"width": 1024}, 80),
            ({"height": 256}, 5),
            ({"width": 2048, "image": info(1000, 500)}, 160),
            ({"height": 512, "image": info(1000, 500)}, 40),
        ],
    )
    def test_steps_are_paid_by_the_size_that_the_picture_will_have(self, fields: dict[str, Any], units: int) -> None:
        """A size that the request leaves open is the one that an engine of 512x512 makes of it."""
        assert pool(step_price=0.5).price_of(asked(**fields)) == pytest.approx(units * 0.5)

    def test_a_call_may_have_a_price_of_its_own(self) -> None:
        assert pool(job_price=2).price_of(asked(width=2048, height=2048)) == 2
        assert pool(job_price=2, step_price=1).price_of(asked(num_steps=3)) == 5
        assert pool().price_of(asked()) == 0

    @pytest.mark.parametrize("fields", [{"job_price": 1e-6}, {"step_price": 1e-6}])
    def test_either_price_makes_a_pool_a_priced_one(self, fields: dict[str, float]) -> None:
        assert pool(**fields).is_priced
        assert not pool().is_priced


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "fields", "options", "field", "reason"),
        [
            ({"engine": "cloudflare"}, {}, {"reproducible": True}, "options.reproducible", "leave the option out"),
            ({"engine": "cloudflare"}, {}, {"previews": True}, "options.previews", "leave the option out"),
            ({"max_steps": 8}, {"num_steps": 9}, {}, "num_steps", "it takes at most 8 steps: ask for fewer"),
            ({"max_steps": 8}, {}, {}, "num_steps", "at most 8 steps"),
            ({"max_pixels": 65_536}, {"width": 512, "height": 256}, {}, "width", "(256x256): ask for fewer"),
            ({"max_pixels": 262_144}, {"width": 520}, {}, "width", "at most 262144 pixels (512x512)"),
            ({"max_pixels": 262_144}, {"height": 520}, {}, "height", "at most 262144 pixels (512x512)"),
            ({"max_pixels": 262_144}, {"width": 512, "image": info(1, 2)}, {}, "width", "at most 262144 pixels"),
        ],
    )
    def test_a_pool_says_which_field_is_beyond_it_and_what_to_do(
        self, limits: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], field: str, reason: str
    ) -> None:
        why = pool(**limits).why_not(asked(**fields), JobOptions(**options))
        assert why is not None
        assert why[0] == field
        assert reason in why[1]

    @pytest.mark.parametrize(
        ("limits", "fields", "options"),
        [
            ({}, {"width": 2048, "height": 2048}, {"reproducible": True, "previews": True}),
            ({"engine": "fake"}, {}, {"reproducible": True, "previews": True}),
            ({"engine": "cloudflare"}, {"width": 2048, "height": 2048}, {"priority": 1}),
            ({"max_steps": 8}, {"num_steps": 8}, {}),
            ({"max_pixels": 262_144}, {"width": 512, "height": 512}, {}),
            ({"max_pixels": 262_144}, {"width": 512}, {}),
        ],
    )
    def test_what_is_within_its_limits_a_pool_takes(
        self, limits: dict[str, Any], fields: dict[str, Any], options: dict[str, Any]
    ) -> None:
        assert pool(**limits).why_not(asked(**fields), JobOptions(**options)) is None

    def test_the_models_own_size_is_never_too_large(self) -> None:
        """Which one that is only its worker knows; a limit below it would refuse every plain request."""
        assert pool(max_pixels=1).why_not(asked(), JobOptions()) is None
        assert pool(max_pixels=1).why_not(asked(image=info(2000, 1000)), JobOptions()) is None
