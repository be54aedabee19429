//! Integer expressions over named sizes: `ceil(n, 256) * 4`.

use std::collections::BTreeMap;

/// The value of each size.
pub type Sizes = BTreeMap<String, i64>;

/// Evaluates an expression of numbers, names, `+ - * / %`, brackets, `ceil(a, b)` (a over b, rounded up), `min` and `max`.
///
/// # Errors
/// A sentence that names the expression and what is wrong with it.
pub fn evaluate(text: &str, sizes: &Sizes) -> Result<i64, String> {
    let mut parser = Parser { text, at: 0, sizes };
    let value = parser.sum().and_then(|value| match parser.next() {
        None => Ok(value),
        Some(c) => Err(format!("`{c}` is not expected")),
    });
    value.map_err(|why| format!("the expression `{text}`: {why}"))
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    sizes: &'t Sizes,
}

impl Parser<'_> {
    /// The next character that is no space.
    fn next(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    fn take(&mut self, expected: char) -> Result<(), String> {
        match self.next() {
            Some(c) if c == expected => {
                self.at += c.len_utf8();
                Ok(())
            }
            _ => Err(format!("`{expected}` is missing")),
        }
    }

    fn sum(&mut self) -> Result<i64, String> {
        let mut value = self.product()?;
        while let Some(c @ ('+' | '-')) = self.next() {
            self.at += 1;
            let other = self.product()?;
            let sum = if c == '+' { value.checked_add(other) } else { value.checked_sub(other) };
            value = sum.ok_or("it overflows")?;
        }
        Ok(value)
    }

    fn product(&mut self) -> Result<i64, String> {
        let mut value = self.factor()?;
        while let Some(c @ ('*' | '/' | '%')) = self.next() {
            self.at += 1;
            let other = self.factor()?;
            let result = match c {
                '*' => value.checked_mul(other),
                '/' => value.checked_div(other),
                _ => value.checked_rem(other),
            };
            value = result.ok_or("it divides by zero or overflows")?;
        }
        Ok(value)
    }

    fn factor(&mut self) -> Result<i64, String> {
        match self.next() {
            Some('(') => {
                self.at += 1;
                let value = self.sum()?;
                self.take(')')?;
                Ok(value)
            }
            Some('-') => {
                self.at += 1;
                self.factor()?.checked_neg().ok_or_else(|| "it overflows".into())
            }
            Some(c) if c.is_ascii_digit() => {
                let digits = self.word(|c| c.is_ascii_digit());
                digits.parse().map_err(|_| format!("{digits} is too large"))
            }
            Some(c) if c.is_alphabetic() || c == '_' => {
                let name = self.word(|c| c.is_alphanumeric() || c == '_');
                if self.next() == Some('(') {
                    return self.call(&name);
                }
                self.sizes.get(&name).copied().ok_or_else(|| format!("there is no size `{name}`"))
            }
            Some(c) => Err(format!("`{c}` is not expected")),
            None => Err("it ends too early".into()),
        }
    }

    fn word(&mut self, part: impl Fn(char) -> bool) -> String {
        let rest = &self.text[self.at..];
        let word = &rest[..rest.find(|c| !part(c)).unwrap_or(rest.len())];
        self.at += word.len();
        word.to_owned()
    }

    fn call(&mut self, name: &str) -> Result<i64, String> {
        self.take('(')?;
        let a = self.sum()?;
        self.take(',')?;
        let b = self.sum()?;
        self.take(')')?;
        match name {
            "ceil" if b > 0 => {
                a.checked_add(b - 1).map(|sum| sum / b).ok_or_else(|| "it overflows".into())
            }
            "ceil" => Err("`ceil` divides by a positive number".into()),
            "min" => Ok(a.min(b)),
            "max" => Ok(a.max(b)),
            _ => Err(format!("there is no function `{name}`; known are ceil, min and max")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_have_the_usual_precedence() {
        let sizes = Sizes::from([("n".into(), 1000), ("rows".into(), 7)]);
        let value = |text: &str| evaluate(text, &sizes);
        assert_eq!(value("ceil(n, 256) * 4 - -2"), Ok(18));
        assert_eq!(value("(n + rows) % 10 + max(1, min(n, rows))"), Ok(14));
        for (text, why) in [
            ("m", "there is no size `m`"),
            ("n /", "ends too early"),
            ("n / 0", "divides by zero"),
            ("2 n", "`n` is not expected"),
            ("floor(n, 2)", "no function `floor`"),
            ("9223372036854775807 + 1", "overflows"),
        ] {
            let said = value(text).unwrap_err();
            assert!(said.contains(why) && said.contains(text), "{said}");
        }
    }
}
