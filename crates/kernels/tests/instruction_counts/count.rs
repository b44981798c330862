//! Counts the instructions that a closure retires, exactly, with what every x86-64 processor and Linux have.
//!
//! The trap flag makes the processor trap after each instruction; the system turns the trap into SIGTRAP for the thread
//! that ran into it, whose handler counts. No performance counters (virtual machines rarely have them), no tracing
//! process, no permission is needed, and other threads are not disturbed.
//!
//! What runs outside the program's own code is left out: the C library copies memory in a way that depends on the machine.

use std::arch::asm;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::hint::black_box;

/// The trap flag among the processor's flags.
const TRAP: u64 = 1 << 8;

unsafe extern "C" {
    /// Where the linker placed the first byte of the program.
    static __executable_start: u8;
    /// The end of its code.
    static etext: u8;
}

thread_local! {
    /// Without a destructor and with a constant start, so that the handler may use it.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

extern "C" fn count_one(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes the interrupted thread's registers.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    if (&raw const __executable_start as usize..&raw const etext as usize).contains(&at) {
        COUNT.set(COUNT.get() + 1);
    }
}

/// Instructions of this program that `body` retires on this thread, the call included.
pub fn instructions(body: &mut dyn FnMut()) -> u64 {
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = count_one;
    // SAFETY: no flag but the one that the handler's arguments need, no signal masked. The handler touches one cell of its
    // own thread, and a trap comes only where a thread asked for it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        (action.sa_sigaction, action.sa_flags) = (handler as usize, libc::SA_SIGINFO);
        libc::sigaction(libc::SIGTRAP, &action, std::ptr::null_mut());
    }
    // What lies between the two flags is the same for every body: none may be inlined.
    let around = stepped(black_box(&mut || {}));
    stepped(black_box(body)) - around
}

#[inline(never)]
fn stepped(body: &mut dyn FnMut()) -> u64 {
    COUNT.set(0);
    // SAFETY: only the trap flag changes, and its handler is in place; the stack is left as it was.
    unsafe { asm!("pushfq", "or qword ptr [rsp], {trap}", "popfq", trap = const TRAP) };
    body();
    // SAFETY: as above.
    unsafe { asm!("pushfq", "and qword ptr [rsp], {others}", "popfq", others = const !(TRAP as i64)) };
    COUNT.get()
}

/// Whether counting works here: an emulated or filtered system might not deliver the traps.
pub fn is_supported() -> bool {
    let mut known = || {
        // 1 + 2 × 1000 instructions.
        // SAFETY: one register is counted down.
        unsafe { asm!("mov {n:e}, 1000", "2:", "dec {n:e}", "jnz 2b", n = out(reg) _) };
    };
    // A compiler may add a few around the loop.
    (2001..2010).contains(&instructions(&mut known))
}
