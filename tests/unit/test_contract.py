"""The seed's schema, the struct and the protobuf messages say the same thing."""

import hashlib
import types
import typing
from enum import StrEnum
from importlib import resources
from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import FieldDescriptor

from img2img.errors import InvalidRequest
from img2img.jobs import JobState, Move, Receipt, Stage, UpstreamCall
from img2img.requests import Img2ImgRequest, JobOptions, OutputFormat, Parameters, Sampler, build_request
from img2img.schema import INPUT_SCHEMA
from img2img.v1 import img2img_pb2

# Of the schema that Cloudflare publishes for @cf/runwayml/stable-diffusion-v1-5-img2img.
PUBLISHED_SHA256 = "93847ec4e78da3f25f2a7e28dcd2708dd2a01972eb6a513bfd59937d79bad25d"

PROPERTIES: dict[str, dict[str, Any]] = INPUT_SCHEMA["properties"]
FIELDS = {field.name: field for field in msgspec.structs.fields(Img2ImgRequest)}
MESSAGES = img2img_pb2.DESCRIPTOR.message_types_by_name
PROTO_TYPES = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_INT32: "integer",
    FieldDescriptor.TYPE_UINT64: "integer",
    FieldDescriptor.TYPE_DOUBLE: "number",
    FieldDescriptor.TYPE_BYTES: "array",
}
PYTHON_TYPES = {str: "string", int: "integer", float: "number", bytes: "array"}


def scalar(annotation: object) -> object:
    """``int`` of ``int | None``."""
    if isinstance(annotation, types.UnionType):
        (only,) = set(typing.get_args(annotation)) - {types.NoneType}
        return only
    return annotation


class TestSchema:
    def test_the_file_is_the_published_one(self) -> None:
        published = resources.files("img2img").joinpath("input.schema.json").read_bytes()
        assert hashlib.sha256(published).hexdigest() == PUBLISHED_SHA256


class TestStruct:
    def test_it_has_the_schemas_properties_but_one_spelling_of_the_image(self) -> None:
        assert [name for name in PROPERTIES if name != "image_b64"] == list(FIELDS)

    @pytest.mark.parametrize("name", FIELDS)
    def test_each_field_has_the_schemas_type(self, name: str) -> None:
        assert PYTHON_TYPES[typing.cast("type", scalar(FIELDS[name].type))] == PROPERTIES[name]["type"]

    @pytest.mark.parametrize("name", FIELDS)
    def test_each_default_is_the_schemas_or_none(self, name: str) -> None:
        if name in INPUT_SCHEMA["required"]:
            assert FIELDS[name].default is msgspec.NODEFAULT
        else:
            assert FIELDS[name].default == PROPERTIES[name].get("default")

    @pytest.mark.parametrize(
        ("name", "bound", "value"),
        [
            (name, bound, rule[bound])
            for name, rule in PROPERTIES.items()
            for bound in rule
            if bound in ("minimum", "maximum")
        ],
    )
    def test_each_bound_of_the_schema_holds(self, name: str, bound: str, value: int) -> None:
        inside, outside = value, value + (1 if bound == "maximum" else -1)
        assert getattr(build_request({"prompt": "x", name: inside}).request, name) == inside
        with pytest.raises(InvalidRequest, match=f"'/{name}' must be"):
            build_request({"prompt": "x", name: outside})

    def test_what_is_recorded_has_the_same_fields_and_defaults(self) -> None:
        recorded = {field.name: field.default for field in msgspec.structs.fields(Parameters)}
        assert recorded == {name: field.default for name, field in FIELDS.items()}


class TestProtobuf:
    def test_the_request_has_the_schemas_properties_in_its_order(self) -> None:
        fields = MESSAGES["Img2ImgRequest"].fields
        assert [field.name for field in fields] == list(PROPERTIES)
        assert [field.number for field in fields] == list(range(1, len(PROPERTIES) + 1))

    @pytest.mark.parametrize("name", PROPERTIES)
    def test_each_field_has_the_schemas_type_and_can_be_absent(self, name: str) -> None:
        """Without ``optional``, 0 and "not given" would be the same."""
        field = MESSAGES["Img2ImgRequest"].fields_by_name[name]
        assert PROTO_TYPES[field.type] == PROPERTIES[name]["type"]
        assert field.has_presence
        assert not field.is_repeated

    @pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(JobOptions)])
    def test_each_option_is_there_and_can_be_absent(self, name: str) -> None:
        """An enum's absence is its unspecified value."""
        field = MESSAGES["JobOptions"].fields_by_name[name]
        unspecified = field.enum_type is not None and field.enum_type.values_by_number[0].name.endswith("_UNSPECIFIED")
        assert field.has_presence or unspecified

    def test_there_are_no_other_options(self) -> None:
        assert {field.name for field in MESSAGES["JobOptions"].fields} == {
            field.name for field in msgspec.structs.fields(JobOptions)
        }

    def test_parameters_are_those_recorded_but_the_seed_which_the_job_has(self) -> None:
        names = {field.name for field in msgspec.structs.fields(Parameters)}
        assert {field.name for field in MESSAGES["Parameters"].fields} == names - {"seed"}
        assert "seed" in MESSAGES["Job"].fields_by_name

    @pytest.mark.parametrize("kind", [JobState, Sampler, OutputFormat])
    def test_each_enum_has_our_values_after_its_unspecified_one(self, kind: type[StrEnum]) -> None:
        values = img2img_pb2.DESCRIPTOR.enum_types_by_name[kind.__name__].values
        prefix = "".join("_" + char if char.isupper() else char.upper() for char in kind.__name__).lstrip("_")
        expected = ["UNSPECIFIED", *(item.name for item in kind)]
        assert [value.name for value in values] == [f"{prefix}_{name}" for name in expected]
        assert [value.number for value in values] == list(range(len(values)))

    def test_a_receipt_has_the_same_fields_and_the_same_ones_can_be_absent(self) -> None:
        fields = {field.name: field for field in MESSAGES["Receipt"].fields}
        assert set(fields) == {field.name for field in msgspec.structs.fields(Receipt)}
        optional = {field.name for field in msgspec.structs.fields(Receipt) if not field.required}
        assert {name for name, field in fields.items() if field.has_presence} == optional

    def test_an_upstream_call_has_the_same_fields_and_the_same_ones_can_be_absent(self) -> None:
        fields = {field.name: field for field in MESSAGES["UpstreamCall"].fields}
        assert set(fields) == {field.name for field in msgspec.structs.fields(UpstreamCall)}
        optional = {field.name for field in msgspec.structs.fields(UpstreamCall) if not field.required}
        assert {name for name, field in fields.items() if field.has_presence} == optional

    def test_a_move_has_the_same_fields(self) -> None:
        names = [field.name for field in MESSAGES["Move"].fields]
        assert names == [field.name for field in msgspec.structs.fields(Move)]

    def test_stages_go_as_text(self) -> None:
        """They are keys of ``timings``, which an enum cannot be; a client may meet one that it does not know."""
        assert MESSAGES["WatchJobResponse"].fields_by_name["stage"].type == FieldDescriptor.TYPE_STRING
        entry = MESSAGES["Job"].fields_by_name["timings"].message_type
        assert entry is not None
        assert entry.fields_by_name["key"].type == FieldDescriptor.TYPE_STRING
        assert "Stage" not in img2img_pb2.DESCRIPTOR.enum_types_by_name
        assert all(item.value == item.name.lower() for item in Stage)
