//! What Xen's libraries would print to standard error goes to the debug log.
//!
//! Every failure reaches the caller as an error number and is reported once, by him; a guest that publishes nonsense
//! must not fill the service's log through a library.

use std::ffi::{CStr, c_char, c_int};

use super::bindings::{__va_list_tag, xentoollog_level, xentoollog_logger};

static LOGGER: xentoollog_logger =
    xentoollog_logger { vmessage: Some(message), progress: None, destroy: None };

/// The logger to give to the libraries. They only call through it.
pub fn logger() -> *mut xentoollog_logger {
    (&raw const LOGGER).cast_mut()
}

/// The text's arguments stay unprinted: formatting them would need the C library's `vsnprintf`.
unsafe extern "C" fn message(
    _: *mut xentoollog_logger,
    _: xentoollog_level,
    errno: c_int,
    context: *const c_char,
    format: *const c_char,
    _: *mut __va_list_tag,
) {
    if log::log_enabled!(log::Level::Debug) {
        // SAFETY: the library passes a C string or null, valid during the call.
        let (context, format) = (unsafe { text(context) }, unsafe { text(format) });
        log::debug!("{context}: {format} (errno {errno})");
    }
}

/// # Safety
/// `string` must be null or a C string that outlives the result.
unsafe fn text<'a>(string: *const c_char) -> std::borrow::Cow<'a, str> {
    if string.is_null() {
        return "".into();
    }
    // SAFETY: promised by the caller.
    unsafe { CStr::from_ptr(string) }.to_string_lossy()
}
