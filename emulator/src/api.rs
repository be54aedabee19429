//! The driver's calls, one file per group; `calls!` adds the behaviour that all of them share.

mod device;
mod memory;
mod module;
mod stream;

/// Declares driver calls. The first parameter names the driver's state in the body, and `?` returns an error. `always`
/// marks calls that still work after a fatal error.
macro_rules! calls {
    () => {};
    (always fn $name:ident($driver:ident $(, $arg:ident: $ty:ty)* $(,)?) $body:block $($rest:tt)*) => {
        calls!(@one true, $name($driver $(, $arg: $ty)*) $body);
        calls!($($rest)*);
    };
    (fn $name:ident($driver:ident $(, $arg:ident: $ty:ty)* $(,)?) $body:block $($rest:tt)*) => {
        calls!(@one false, $name($driver $(, $arg: $ty)*) $body);
        calls!($($rest)*);
    };
    (@one $always:literal, $name:ident($driver:ident $(, $arg:ident: $ty:ty)*) $body:block) => {
        #[allow(non_snake_case)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
            crate::driver::call(stringify!($name), $always, |$driver| {
                let _ = &$driver;
                #[allow(unused_unsafe)]
                unsafe { $body }
                #[allow(unreachable_code)]
                Ok(())
            })
        }
    };
}
pub(crate) use calls;
