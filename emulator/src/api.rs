//! The driver's calls. Each group is a file; `calls!` gives every call what all of them share.

mod device;
mod memory;
mod module;
mod stream;

/// Declares driver calls. The body has the driver's state under the name given first, and `?` answers an error; `alive`
/// marks calls that still work after a fatal error.
macro_rules! calls {
    () => {};
    (alive fn $name:ident($driver:ident $(, $arg:ident: $ty:ty)* $(,)?) $body:block $($rest:tt)*) => {
        calls!(@one true, $name($driver $(, $arg: $ty)*) $body);
        calls!($($rest)*);
    };
    (fn $name:ident($driver:ident $(, $arg:ident: $ty:ty)* $(,)?) $body:block $($rest:tt)*) => {
        calls!(@one false, $name($driver $(, $arg: $ty)*) $body);
        calls!($($rest)*);
    };
    (@one $alive:literal, $name:ident($driver:ident $(, $arg:ident: $ty:ty)*) $body:block) => {
        #[allow(non_snake_case)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
            crate::driver::call(stringify!($name), $alive, |$driver| {
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
