import pytest

from bitdance_jax.plan import hlo
from bitdance_jax.plan.hlo import Shape


MODULE = """HloModule jit_f, is_scheduled=true

FileNames
1 "f.py"

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)S(1)}) tuple(%p, /*index=1*/%p), META
}

ENTRY %main.3 (x: bf16[4,32]) -> f32[4] {
  %x.1 = bf16[4,32]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %c = s32[]{:T(128)} constant(7)
  ROOT %fusion = f32[4]{0} fusion(%x.1, %c), kind=kLoop, calls=%body, CONFIG
}
""".replace("CONFIG", 'backend_config={"estimated_cycles":"12"}')
MODULE = MODULE.replace("META", "metadata={op_name=\"jit(f)/w[\\'a\\']/add\"}")


def test_computations_instructions_and_attributes():
    module = hlo.parse(MODULE)
    assert module.entry == "main.3"
    assert set(module.computations) == {"body", "main.3"}
    main = module["main.3"]
    assert [i.name for i in main] == ["x.1", "c", "fusion"]
    assert main.root == "fusion"
    fusion = main["fusion"]
    assert fusion.opcode == "fusion"
    assert fusion.operands == ("x.1", "c")
    assert fusion.called("calls") == "body"
    assert fusion.attribute(r'"estimated_cycles":"(\d+)"') == "12"
    assert main["c"].argument == "7"
    assert main["x.1"].op_name == "x"
    assert main.parameters == [main["x.1"]]
    assert main.users("c") == [fusion]


def test_line_breaks_in_the_metadata_of_kernels():
    metadata = 'frontend_attributes={kernel_metadata={\n"block":"1"\n}}, metadata={op_name="k"}'
    module = hlo.parse(MODULE.replace('metadata={op_name="x"}', metadata))
    assert [i.name for i in module["main.3"]] == ["x.1", "c", "fusion"]
    assert module["main.3"]["x.1"].op_name == "k"


def test_tuples_layouts_and_escaped_names():
    body = hlo.parse(MODULE)["body"]
    number, array = body["t"].shape
    assert (number.dims, array.dims, array.tile, array.space) == ((), (8, 128), (8, 128), 1)
    assert body["t"].operands == ("p", "p")
    assert body["t"].op_name == "jit(f)/w[\\'a\\']/add"


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        (Shape("f32", (8, 128), (1, 0), (8, 128)), 8 * 128 * 4),
        (Shape("bf16", (3, 9, 32), (2, 1, 0), (8, 128)), 3 * 16 * 128 * 2),  # 9 to 16, 32 to 128
        (
            Shape("bf16", (3, 9, 32), (0, 2, 1), (8, 128)),
            9 * 32 * 128 * 2,  # the first axis varies fastest: 3 to 128
        ),
        (Shape("f32", (5,), (0,), (128,)), 128 * 4),
        (Shape("f32", (5,), (0,), (8, 128)), 8 * 128 * 4),  # fewer axes than the tile
        (Shape("s4", (6,), (0,)), 3),
        (Shape("pred", (), ()), 1),
    ],
)
def test_bytes_with_padding_to_tiles(shape, padded):
    assert shape.bytes == padded
    assert shape.logical_bytes <= padded
