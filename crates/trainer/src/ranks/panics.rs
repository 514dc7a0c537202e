//! What a panic says in one line.

use std::any::Any;

/// The first line of a panic's message; libtorch appends its own call stack.
pub fn panic_line(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
    text.split(['\n', '\r']).next().and_then(|line| line.split("\\n").next()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_panic_the_first_line_is_said() {
        let payload: Box<dyn Any + Send> = Box::new("Torch(\"sizes differ\\nframe #0: abort\")".to_string());
        assert_eq!(panic_line(payload.as_ref()), "Torch(\"sizes differ");
        assert_eq!(panic_line(&"one\ntwo"), "one");
        assert_eq!(panic_line(&7), "no message");
    }
}
