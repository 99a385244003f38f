//! The two calls of libxl that `xl` does not offer on its own, found in the library when they are needed: nothing of Xen's is wanted
//! where this is compiled, and hosts without Xen never come here.
//!
//! The library's name carries Xen's version (`libxenlight.so.4.17`), and no other than [`RELEASE`]'s is loaded: signatures are those of
//! `libxl.h` and `xentoollog.h` of Xen 4.17, and libxl may change them with every release.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    fmt,
    os::fd::RawFd,
};

/// The release of Xen whose libxl is used here.
pub const RELEASE: &str = "4.17";

/// `LIBXL_SUSPEND_LIVE`: copy while the domain runs.
const SUSPEND_LIVE: c_int = 2;
/// `XTL_PROGRESS` of `xentoollog_level`.
const LEVEL_PROGRESS: c_int = 4;
/// `XTL_STDIOSTREAM_PROGRESS_NO_CR`: one line for each word of progress.
const LINES: c_uint = 0o20;
/// `ERROR_GUEST_TIMEDOUT` of `libxl_error`: the domain did not suspend, and runs.
const GUEST_TIMED_OUT: c_int = -8;

/// Why a call was not made, or failed.
#[derive(Debug)]
pub enum LibxlError {
    /// This is not libxl of [`RELEASE`].
    Release(String),
    /// The library, or something in it, is not there.
    Missing(String),
    /// It cannot begin.
    Begin(c_int),
    /// The call failed; the library has said why on its standard error.
    Call {
        /// Which.
        what: &'static str,
        /// Its `libxl_error`.
        code: c_int,
        /// Whether the domain runs, whatever it was before.
        is_running: bool,
    },
}

impl std::error::Error for LibxlError {}

impl fmt::Display for LibxlError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Release(name) => {
                write!(out, "libxl cannot be used: {name} is not of Xen {RELEASE}, for which this is made")
            }
            Self::Missing(what) => write!(out, "libxl cannot be used: {what}"),
            Self::Begin(code) => write!(out, "libxl cannot begin (error {code})"),
            Self::Call { what, code, is_running: true } => write!(out, "{what} failed (error {code}); the domain runs"),
            Self::Call { what, code, is_running: false } => write!(out, "{what} failed (error {code})"),
        }
    }
}

type Alloc = unsafe extern "C" fn(*mut *mut c_void, c_int, c_uint, *mut c_void) -> c_int;
type Suspend = unsafe extern "C" fn(*mut c_void, u32, c_int, c_int, *const c_void) -> c_int;
type Resume = unsafe extern "C" fn(*mut c_void, u32, c_int, *const c_void) -> c_int;
type CreateLogger = unsafe extern "C" fn(*mut libc::FILE, c_int, c_uint) -> *mut c_void;

/// The library's name.
pub fn library() -> String {
    format!("libxenlight.so.{RELEASE}")
}

/// libxl, begun. It lives as long as its process: nothing is given back.
pub struct Libxl {
    context: *mut c_void,
    suspend: Suspend,
    resume: Resume,
}

fn open(name: &str) -> Result<*mut c_void, LibxlError> {
    let path = CString::new(name).map_err(|_| LibxlError::Missing("its name has a zero in it".to_owned()))?;
    // SAFETY: a C string; loading runs the library's initializers, which are Xen's own and made for it.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() { Err(LibxlError::Missing(last_error())) } else { Ok(library) }
}

fn last_error() -> String {
    // SAFETY: dlerror gives null, or a C string that is good until the next call of its kind in this thread.
    let said = unsafe { libc::dlerror() };
    if said.is_null() {
        return "it says nothing".to_owned();
    }
    // SAFETY: not null, so a C string as above.
    unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned()
}

fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, LibxlError> {
    // SAFETY: a handle that dlopen gave, and a C string.
    let found = unsafe { libc::dlsym(library, name.as_ptr().cast::<c_char>()) };
    if found.is_null() { Err(LibxlError::Missing(name.to_string_lossy().into_owned())) } else { Ok(found) }
}

impl Libxl {
    /// Loads the library of this name and begins to use it. What it does is told on standard error, a line each.
    ///
    /// # Errors
    /// When it is another release's, is not there, or cannot begin.
    pub fn begin(library: &str) -> Result<Self, LibxlError> {
        if library != self::library() {
            return Err(LibxlError::Release(library.to_owned()));
        }
        let (light, log) = (open(library)?, open("libxentoollog.so.1")?);
        let logger = symbol(log, c"xtl_createlogger_stdiostream")?;
        let (alloc, suspend, resume) = (
            symbol(light, c"libxl_ctx_alloc")?,
            symbol(light, c"libxl_domain_suspend")?,
            symbol(light, c"libxl_domain_resume")?,
        );
        // SAFETY: the functions of these names have these signatures in the release that was asked for just now (see the head of this
        // file); xentoollog's have been the same since its library got its number, 1.
        let (alloc, suspend, resume, logger) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Alloc>(alloc),
                std::mem::transmute::<*mut c_void, Suspend>(suspend),
                std::mem::transmute::<*mut c_void, Resume>(resume),
                std::mem::transmute::<*mut c_void, CreateLogger>(logger),
            )
        };
        // SAFETY: standard error is open for as long as this process lives; the mode is a C string.
        let stream = unsafe { libc::fdopen(libc::STDERR_FILENO, c"a".as_ptr()) };
        if stream.is_null() {
            return Err(LibxlError::Missing("standard error".to_owned()));
        }
        // SAFETY: an open stream, which is never closed.
        let logger = unsafe { logger(stream, LEVEL_PROGRESS, LINES) };
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for a pointer, the version that there is (0), no flags, and a logger that is never destroyed. Its type begins
        // with the one that is wanted.
        let code = unsafe { alloc(&raw mut context, 0, 0, logger) };
        if code != 0 || context.is_null() {
            return Err(LibxlError::Begin(code));
        }
        Ok(Self { context, suspend, resume })
    }

    /// Sends a domain into `stream` and leaves it suspended there: everything has gone. When that fails, it is let run on.
    ///
    /// # Errors
    /// When it was not sent.
    pub fn send(&self, domain: u32, stream: RawFd, is_live: bool) -> Result<(), LibxlError> {
        let flags = if is_live { SUSPEND_LIVE } else { 0 };
        // SAFETY: a context that was begun, an open descriptor; without an `ao_how` the call returns when it is over.
        let code = unsafe { (self.suspend)(self.context, domain, stream, flags, std::ptr::null()) };
        if code == 0 {
            return Ok(());
        }
        // One that was not suspended yet runs as it is, and this is refused for it.
        let is_running = code == GUEST_TIMED_OUT || self.resume(domain).is_ok();
        Err(LibxlError::Call { what: "sending the domain", code, is_running })
    }

    /// Lets a suspended domain run on where it is: for it the suspension was cancelled.
    ///
    /// # Errors
    /// When libxl refuses.
    pub fn resume(&self, domain: u32) -> Result<(), LibxlError> {
        // SAFETY: as above.
        let code = unsafe { (self.resume)(self.context, domain, 1, std::ptr::null()) };
        if code == 0 { Ok(()) } else { Err(LibxlError::Call { what: "resuming the domain", code, is_running: false }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_xen_says_what_is_missing() {
        let error = open("libxenlight.so.0.0-not-there").unwrap_err();
        assert!(error.to_string().contains("libxenlight.so.0.0-not-there"), "{error}");
    }

    #[test]
    fn another_releases_library_is_not_loaded() {
        for other in ["libxenlight.so.4.18", "libxenlight.so.4.1", "libxenlight.so", "/tmp/libxenlight.so.4.17", ""] {
            let Err(error) = Libxl::begin(other) else { panic!("{other} is taken") };
            assert!(matches!(&error, LibxlError::Release(name) if name == other), "{error}");
        }
        assert_eq!(library(), "libxenlight.so.4.17");
    }
}
