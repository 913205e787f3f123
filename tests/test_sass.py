"""Blocks and loops of machine code, on small listings in nvdisasm's own form."""

from qlora_jax import sass
from qlora_jax.machine_code import MachineCode
from qlora_jax.targets import find_target

# A loop of four instructions, one of which waits out of line, behind the kernel's end.
LOOP = """
	.section	.text.helper,"ax",@progbits
.text.helper:
        /*0000*/                   RET.REL.NODEC R2 `(kernel) ;
	.section	.text.kernel,"ax",@progbits
        .other          kernel,@"STO_CUDA_ENTRY STV_DEFAULT"
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK P0, [R4] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   HGMMA.64x8x16.F32.BF16 R8, R4, gdesc[UR4] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   SYNCS.PHASECHK P0, [R4] ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
        /*00a0*/                   NOP;
"""

# The same as a dump of Mosaic GPU prints it, with the scheduler's control codes in front.
CONTROL = """
   -:-:-:Y:01        /*0000*/                   SHFL.IDX PT, R5, R0, RZ, 0x1f 
   -:-:-:Y:01        /*0010*/                   BRA.DIV UR4, `(.L_x_1) 
   0:-:-:Y:02        /*0020*/               @P0 EXIT 
.L_x_0:
   -:-:-:Y:01        /*0030*/                   STG.E.128 [R2], R4 
   -:-:-:Y:05        /*0040*/                   EXIT 
.L_x_1:
   -:-:-:Y:01        /*0050*/                   WARPSYNC.COLLECTIVE R2, `(.L_x_2) 
   -:-:-:Y:01        /*0060*/                   BRA `(.L_x_0) 
"""


def opcodes(instructions):
    return [one.opcode for one in instructions]


def code(**changes):
    values = dict(
        kernel="k",
        architecture="sm_90a",
        blocks=10,
        threads=128,
        registers=32,
        spill_bytes=0,
        shared_bytes=0,
        disassembly=LOOP,
    )
    return MachineCode(**{**values, **changes})


def test_the_loop_is_found_and_waiting_out_of_line_belongs_to_it():
    loop = sass.longest_loop(LOOP)
    assert [one.address for one in loop] == [0x10, 0x20, 0x30, 0x40, 0x60, 0x70, 0x80]


def test_a_jump_back_from_behind_the_end_is_no_loop_and_neither_is_waiting():
    straight = LOOP.replace("@P1 BRA `(.L_x_1)", "    NOP")
    assert sass.longest_loop(straight) == []
    busy = straight.replace("/*0060*/                   SYNCS.PHASECHK P0", "/*0060*/     LDS R5")
    assert [one.address for one in sass.longest_loop(busy)] == [0x60, 0x70]


def test_what_cannot_be_reached_is_left_out():
    found = opcodes(sass.reachable(LOOP))
    assert found.count("EXIT") == 1 and "RET" not in found and "NOP" not in found
    assert found.count("BRA") == 4  # not the one that jumps to itself at the end
    assert "RET" in opcodes(sass.instructions(LOOP))


def test_code_for_diverged_warps_is_left_out():
    assert opcodes(sass.reachable(CONTROL)) == ["SHFL", "BRA", "EXIT", "STG", "EXIT"]
    assert sass.longest_loop(CONTROL) == []


def test_machine_code_counts_its_instructions():
    assert code().tensor_core() == ["HGMMA"]
    assert len(code().main_loop()) == 7 and len(code().instructions()) == 9
    assert code().opcodes()["SYNCS"] == 2


def test_occupancy_is_what_the_scarcest_resource_allows():
    h100, t4 = find_target("h100"), find_target("t4")
    assert code().occupancy(h100) == 1.0
    # 79 registers are 10 * 256 a warp: 25 warps, and so 24; 6 blocks of 4.
    assert code(registers=79).occupancy(h100) == 24 / 64
    # 57 KiB and the 1 KiB that every block costs: 3 of 228.
    assert code(shared_bytes=57 << 10).occupancy(h100) == 3 * 4 / 64
    # 32 blocks a multiprocessor at most, of one warp each; 16 on a T4, which holds 32 warps.
    assert code(threads=32).occupancy(h100) == 32 / 64
    assert code(threads=32).occupancy(t4) == 16 / 32
    assert code(shared_bytes=32 << 10).occupancy(t4) == 2 * 4 / 32
    assert code(shared_bytes=find_target("h100").shared_bytes_per_core).occupancy(h100) == 0
