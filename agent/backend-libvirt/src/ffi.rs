//! The calls into libvirt that crate `virt` lacks, made safe.
//!
//! Besides public calls these are the five phases of libvirt's v3 migration protocol, `virDomainMigrate{Begin,Prepare,
//! Perform,Finish,Confirm}3Params`. `virDomainMigrate3` is nothing but these five in a row on two connections; the
//! library exports them (version node `LIBVIRT_PRIVATE_*`) because its own daemons need them. Driving them ourselves is
//! what lets a decision stand between "all is at the destination" and "the source is destroyed". Their signatures have
//! not changed since libvirt 1.1.0 (2013, `src/libvirt_internal.h`). They are looked up at run time: where one is
//! missing, live migration is refused by name.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
};

use virt::{connect::Connect, domain::Domain, sys};

/// What libvirt says when something fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct LibError {
    /// `virErrorNumber`.
    pub code: u32,
    /// Its words, cut to 1,024 characters.
    pub message: String,
}

impl LibError {
    pub(crate) fn new(code: u32, message: &str) -> Self {
        Self { code, message: message.chars().take(1024).collect() }
    }

    /// The calling thread's last error.
    fn last() -> Self {
        virt::error::Error::last_error().into()
    }

    pub(crate) fn is_no_domain(&self) -> bool {
        self.code == sys::VIR_ERR_NO_DOMAIN
    }

    pub(crate) fn is_no_metadata(&self) -> bool {
        self.code == sys::VIR_ERR_NO_DOMAIN_METADATA
    }

    /// Whether the guest's state does not allow it: it may have just ended.
    pub(crate) fn is_invalid(&self) -> bool {
        self.code == sys::VIR_ERR_OPERATION_INVALID
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.code == sys::VIR_ERR_OPERATION_ABORTED
    }
}

impl From<virt::error::Error> for LibError {
    fn from(error: virt::error::Error) -> Self {
        // SAFETY: reads the calling thread's last error, which is the one at hand: `virt` calls return on the thread
        // that made them.
        let code = unsafe { sys::virGetLastErrorCode() };
        Self::new(u32::try_from(code).unwrap_or(0), error.message())
    }
}

pub(crate) type LibResult<T> = Result<T, LibError>;

fn c_text(text: &str) -> LibResult<CString> {
    CString::new(text).map_err(|_| LibError::new(sys::VIR_ERR_INVALID_ARG, "a text holds a zero byte"))
}

fn check(result: c_int) -> LibResult<()> {
    if result < 0 { Err(LibError::last()) } else { Ok(()) }
}

/// libvirt's typed parameters.
pub(crate) struct Params {
    list: sys::virTypedParameterPtr,
    used: c_int,
    room: c_int,
}

impl Params {
    pub(crate) const fn new() -> Self {
        Self { list: ptr::null_mut(), used: 0, room: 0 }
    }

    pub(crate) fn text(mut self, name: &CStr, value: &str) -> LibResult<Self> {
        let value = c_text(value)?;
        // SAFETY: list, used and room describe one allocation of libvirt's (or none yet); name and value are valid for
        // the call, which copies them.
        let result = unsafe {
            sys::virTypedParamsAddString(
                &raw mut self.list,
                &raw mut self.used,
                &raw mut self.room,
                name.as_ptr(),
                value.as_ptr(),
            )
        };
        check(result).map(|()| self)
    }

    pub(crate) fn number(mut self, name: &CStr, value: u64) -> LibResult<Self> {
        // SAFETY: as in `text`.
        let result = unsafe {
            sys::virTypedParamsAddULLong(
                &raw mut self.list,
                &raw mut self.used,
                &raw mut self.room,
                name.as_ptr(),
                value,
            )
        };
        check(result).map(|()| self)
    }

    /// A number of the list, of whichever of libvirt's integer types; `None` when it is not there.
    pub(crate) fn get(&self, name: &CStr) -> Option<u64> {
        let mut long = 0;
        let mut int: c_int = 0;
        // SAFETY: list holds `used` parameters; the calls only read them and write the out values on success (1).
        unsafe {
            if sys::virTypedParamsGetULLong(self.list, self.used, name.as_ptr(), &raw mut long) == 1 {
                return Some(long);
            }
            if sys::virTypedParamsGetInt(self.list, self.used, name.as_ptr(), &raw mut int) == 1 {
                return u64::try_from(int).ok();
            }
        }
        None
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        // SAFETY: list was allocated by libvirt and holds `used` parameters; nobody else frees it.
        unsafe { sys::virTypedParamsFree(self.list, self.used) };
    }
}

/// Bytes that libvirt allocated and gave away.
struct OutBytes {
    data: *mut c_char,
    len: c_int,
}

impl OutBytes {
    const fn new() -> Self {
        Self { data: ptr::null_mut(), len: 0 }
    }

    fn to_vec(&self) -> Vec<u8> {
        let len = usize::try_from(self.len).unwrap_or(0);
        if self.data.is_null() || len == 0 {
            return Vec::new();
        }
        // SAFETY: libvirt's contract: data points to len bytes that are ours until freed.
        unsafe { std::slice::from_raw_parts(self.data.cast::<u8>(), len) }.to_vec()
    }
}

impl Drop for OutBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with malloc by libvirt (or null), freed once.
        unsafe { libc::free(self.data.cast::<c_void>()) };
    }
}

type BeginFn = unsafe extern "C" fn(
    sys::virDomainPtr,
    sys::virTypedParameterPtr,
    c_int,
    *mut *mut c_char,
    *mut c_int,
    c_uint,
) -> *mut c_char;
type PrepareFn = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virTypedParameterPtr,
    c_int,
    *const c_char,
    c_int,
    *mut *mut c_char,
    *mut c_int,
    *mut *mut c_char,
    c_uint,
) -> c_int;
type PerformFn = unsafe extern "C" fn(
    sys::virDomainPtr,
    *const c_char,
    sys::virTypedParameterPtr,
    c_int,
    *const c_char,
    c_int,
    *mut *mut c_char,
    *mut c_int,
    c_uint,
) -> c_int;
type FinishFn = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virTypedParameterPtr,
    c_int,
    *const c_char,
    c_int,
    *mut *mut c_char,
    *mut c_int,
    c_uint,
    c_int,
) -> sys::virDomainPtr;
type ConfirmFn = unsafe extern "C" fn(
    sys::virDomainPtr,
    sys::virTypedParameterPtr,
    c_int,
    *const c_char,
    c_int,
    c_uint,
    c_int,
) -> c_int;

/// The five phases, found in the loaded library.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PhaseCalls {
    begin: BeginFn,
    prepare: PrepareFn,
    perform: PerformFn,
    finish: FinishFn,
    confirm: ConfirmFn,
}

fn find(name: &'static CStr) -> Result<*mut c_void, &'static CStr> {
    // SAFETY: RTLD_DEFAULT with a valid name; libvirt is linked, so it is loaded.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() { Err(name) } else { Ok(found) }
}

fn cookie_len(cookie: &[u8]) -> LibResult<c_int> {
    c_int::try_from(cookie.len()).map_err(|_| LibError::new(sys::VIR_ERR_INVALID_ARG, "the cookie is too long"))
}

impl PhaseCalls {
    /// Looks them up; the error names the first that is missing.
    pub(crate) fn find() -> Result<Self, &'static CStr> {
        // SAFETY: the five symbols have had these signatures since they exist (libvirt 1.1.0, libvirt_internal.h).
        unsafe {
            Ok(Self {
                begin: std::mem::transmute::<*mut c_void, BeginFn>(find(c"virDomainMigrateBegin3Params")?),
                prepare: std::mem::transmute::<*mut c_void, PrepareFn>(find(c"virDomainMigratePrepare3Params")?),
                perform: std::mem::transmute::<*mut c_void, PerformFn>(find(c"virDomainMigratePerform3Params")?),
                finish: std::mem::transmute::<*mut c_void, FinishFn>(find(c"virDomainMigrateFinish3Params")?),
                confirm: std::mem::transmute::<*mut c_void, ConfirmFn>(find(c"virDomainMigrateConfirm3Params")?),
            })
        }
    }

    /// Phase 1, source: gives the first cookie. (The XML that it also gives is not used: the destination renders its
    /// own from the guest's spec.)
    pub(crate) fn begin(&self, domain: &Domain, params: &Params, flags: u32) -> LibResult<Vec<u8>> {
        let mut cookie = OutBytes::new();
        // SAFETY: domain and params are live for the call; the out values are freed below and by OutBytes.
        unsafe {
            let xml = (self.begin)(
                domain.as_ptr(),
                params.list,
                params.used,
                &raw mut cookie.data,
                &raw mut cookie.len,
                flags,
            );
            if xml.is_null() {
                return Err(LibError::last());
            }
            libc::free(xml.cast::<c_void>());
        }
        Ok(cookie.to_vec())
    }

    /// Phase 2, destination: makes the waiting machine.
    pub(crate) fn prepare(&self, at: &Connect, params: &Params, cookie: &[u8], flags: u32) -> LibResult<Vec<u8>> {
        let mut out = OutBytes::new();
        let mut uri = OutBytes::new();
        let len = cookie_len(cookie)?;
        // SAFETY: all pointers are live for the call; out values are freed by OutBytes.
        let result = unsafe {
            (self.prepare)(
                at.as_ptr(),
                params.list,
                params.used,
                cookie.as_ptr().cast::<c_char>(),
                len,
                &raw mut out.data,
                &raw mut out.len,
                &raw mut uri.data,
                flags,
            )
        };
        check(result).map(|()| out.to_vec())
    }

    /// Phase 3, source: copies; returns when the guest is paused and everything is across, or has failed and runs on.
    pub(crate) fn perform(&self, domain: &Domain, params: &Params, cookie: &[u8], flags: u32) -> LibResult<Vec<u8>> {
        let mut out = OutBytes::new();
        let len = cookie_len(cookie)?;
        // SAFETY: as in `prepare`; no destination URI belongs to a direct (not peer-to-peer) migration.
        let result = unsafe {
            (self.perform)(
                domain.as_ptr(),
                ptr::null(),
                params.list,
                params.used,
                cookie.as_ptr().cast::<c_char>(),
                len,
                &raw mut out.data,
                &raw mut out.len,
                flags,
            )
        };
        check(result).map(|()| out.to_vec())
    }

    /// Phase 4, destination: takes what came.
    pub(crate) fn finish(&self, at: &Connect, params: &Params, cookie: &[u8], flags: u32) -> LibResult<Domain> {
        let mut out = OutBytes::new();
        let len = cookie_len(cookie)?;
        // SAFETY: as in `prepare`; a non-null result is a reference that is ours, which Domain frees.
        unsafe {
            let domain = (self.finish)(
                at.as_ptr(),
                params.list,
                params.used,
                cookie.as_ptr().cast::<c_char>(),
                len,
                &raw mut out.data,
                &raw mut out.len,
                flags,
                0,
            );
            if domain.is_null() { Err(LibError::last()) } else { Ok(Domain::from_ptr(domain)) }
        }
    }

    /// Phase 5, source: destroys the source's copy, or (`is_cancelled`) lets it run again.
    pub(crate) fn confirm(&self, domain: &Domain, params: &Params, flags: u32, is_cancelled: bool) -> LibResult<()> {
        // SAFETY: domain and params are live for the call; no cookie is given.
        let result = unsafe {
            (self.confirm)(domain.as_ptr(), params.list, params.used, ptr::null(), 0, flags, c_int::from(is_cancelled))
        };
        check(result)
    }
}

/// `(virDomainState, reason)`. (`Domain::state` of crate `virt` 0.5 loses errors.)
pub(crate) fn domain_state(domain: &Domain) -> LibResult<(u32, u32)> {
    let (mut state, mut reason): (c_int, c_int) = (-1, -1);
    // SAFETY: domain is live; the out values are ours.
    check(unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) })?;
    Ok((u32::try_from(state).unwrap_or(u32::MAX), u32::try_from(reason).unwrap_or(0)))
}

/// The running job's type and figures.
pub(crate) fn job_stats(domain: &Domain) -> LibResult<(c_int, Params)> {
    let mut kind: c_int = 0;
    let mut params = Params::new();
    // SAFETY: domain is live; libvirt allocates the list, which Params frees.
    check(unsafe {
        sys::virDomainGetJobStats(domain.as_ptr(), &raw mut kind, &raw mut params.list, &raw mut params.used, 0)
    })?;
    Ok((kind, params))
}

pub(crate) fn abort_job(domain: &Domain) -> LibResult<()> {
    // SAFETY: domain is live.
    check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
}

/// Saves a guest into a file and ends its machine; when that fails, a guest that ran runs on.
pub(crate) fn save(domain: &Domain, file: &str) -> LibResult<()> {
    let file = c_text(file)?;
    // SAFETY: domain and file are live; no other XML is given.
    check(unsafe { sys::virDomainSaveFlags(domain.as_ptr(), file.as_ptr(), ptr::null(), 0) })
}

/// Makes a guest from a saved file, with this host's XML.
pub(crate) fn restore(at: &Connect, file: &str, xml: &str, flags: u32) -> LibResult<()> {
    let (file, xml) = (c_text(file)?, c_text(xml)?);
    // SAFETY: all are live for the call.
    check(unsafe { sys::virDomainRestoreFlags(at.as_ptr(), file.as_ptr(), xml.as_ptr(), flags) })
}
