//! Glob patterns over keys: `*`, `?` and `[…]` within one part of a key, `**` for any number of parts.

/// A pattern, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    parts: Box<[Part]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// `**`: any number of parts, none among them.
    Parts,
    /// `*`: any one part.
    One,
    Text(Box<str>),
    Tokens(Box<[Token]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`
    Any,
    /// `*`
    Many,
    /// `[…]`, or `[!…]` where the flag is set: characters from one to another.
    Set(bool, Box<[(char, char)]>),
}

impl Glob {
    /// Compiles a pattern. Every text is one: a bracket that is never closed stands for itself.
    #[must_use]
    pub fn new(pattern: &str) -> Self {
        let mut parts: Vec<Part> = pattern.split('/').map(Part::new).collect();
        if parts.last() == Some(&Part::Parts) {
            // What is below `a` matches `a/**`; `a` itself does not.
            parts.push(Part::One);
        }
        let parts = parts.into();
        Glob { parts }
    }

    /// Whether a key matches.
    #[must_use]
    pub fn matches(&self, key: &str) -> bool {
        let (mut parts, mut rest) = (&*self.parts, Some(key));
        // The end first: most keys differ from most patterns in their last part.
        while let [others @ .., last] = parts
            && *last != Part::Parts
        {
            let Some(text) = rest else { return false };
            let (before, tail) = match text.rsplit_once('/') {
                Some((before, tail)) => (Some(before), tail),
                None => (None, text),
            };
            if !last.matches(tail) {
                return false;
            }
            (parts, rest) = (others, before);
        }
        forwards(parts, rest)
    }
}

/// Whether the parts of a key match those of a pattern that is empty or ends with `**`.
fn forwards(mut parts: &[Part], mut rest: Option<&str>) -> bool {
    // Behind the last `**`: the pattern that follows, and the key where it was tried last.
    let mut retry: Option<(&[Part], Option<&str>)> = None;
    loop {
        match (parts, rest) {
            ([], None) | ([Part::Parts], _) => return true,
            ([Part::Parts, others @ ..], _) => {
                retry = Some((others, rest));
                parts = others;
                continue;
            }
            ([first, others @ ..], Some(text)) => {
                let (head, after) = split_first(text);
                if first.matches(head) {
                    (parts, rest) = (others, after);
                    continue;
                }
            }
            _ => {}
        }
        // The `**` takes one part more.
        let Some((others, Some(text))) = retry else {
            return false;
        };
        let (_, after) = split_first(text);
        retry = Some((others, after));
        (parts, rest) = (others, after);
    }
}

fn split_first(text: &str) -> (&str, Option<&str>) {
    match text.split_once('/') {
        Some((head, after)) => (head, Some(after)),
        None => (text, None),
    }
}

impl Part {
    fn new(text: &str) -> Self {
        match text {
            "**" => Part::Parts,
            "*" => Part::One,
            _ if text.contains(['*', '?', '[']) => Part::Tokens(tokens(text).into()),
            _ => Part::Text(text.into()),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Part::Parts | Part::One => true,
            Part::Text(own) => **own == *text,
            Part::Tokens(tokens) => part_matches(tokens, text),
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        let token = match c {
            '*' => Token::Many,
            '?' => Token::Any,
            '[' => match set(rest.as_str()) {
                Some((set, after)) => {
                    rest = after.chars();
                    set
                }
                None => Token::Char('['),
            },
            _ => Token::Char(c),
        };
        tokens.push(token);
    }
    tokens
}

/// The set that begins behind a bracket, and what follows it. A `]` at its beginning is part of it.
fn set(text: &str) -> Option<(Token, &str)> {
    let inside = text.strip_prefix('!');
    let (negated, text) = (inside.is_some(), inside.unwrap_or(text));
    let first = text.chars().next()?;
    let end = text.get(first.len_utf8()..)?.find(']')? + first.len_utf8();
    let mut chars = text.get(..end)?.chars();
    let mut ranges = Vec::new();
    while let Some(from) = chars.next() {
        let mut ahead = chars.clone();
        let to = match (ahead.next(), ahead.next()) {
            (Some('-'), Some(to)) => {
                chars = ahead;
                to
            }
            _ => from,
        };
        ranges.push((from, to));
    }
    Some((Token::Set(negated, ranges.into()), text.get(end + 1..)?))
}

fn part_matches(mut tokens: &[Token], text: &str) -> bool {
    let mut rest = text.chars();
    // Behind the last `*`: the pattern that follows, and the text where it was tried last.
    let mut retry: Option<(&[Token], std::str::Chars<'_>)> = None;
    loop {
        let mut after = rest.clone();
        match (tokens, after.next()) {
            ([], None) => return true,
            ([Token::Many, others @ ..], _) => {
                retry = Some((others, rest.clone()));
                tokens = others;
                continue;
            }
            ([first, others @ ..], Some(c)) if first.matches(c) => {
                (tokens, rest) = (others, after);
                continue;
            }
            _ => {}
        }
        let Some((others, tried)) = &mut retry else {
            return false;
        };
        if tried.next().is_none() {
            return false;
        }
        (tokens, rest) = (others, tried.clone());
    }
}

impl Token {
    fn matches(&self, c: char) -> bool {
        match self {
            Token::Char(own) => *own == c,
            Token::Any => true,
            Token::Many => false,
            Token::Set(negated, ranges) => {
                ranges.iter().any(|(from, to)| (*from..=*to).contains(&c)) != *negated
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Glob;

    fn matching<'a>(pattern: &str, keys: &[&'a str]) -> Vec<&'a str> {
        let glob = Glob::new(pattern);
        let keys = keys.iter().copied();
        keys.filter(|key| glob.matches(key)).collect()
    }

    #[test]
    fn glob_any_parts_match_none_one_and_many() {
        let keys = [
            "zarr.json",
            "a/zarr.json",
            "a/b/zarr.json",
            "a/xzarr.json",
            "zarr.json/a",
        ];
        assert_eq!(matching("**/zarr.json", &keys), &keys[..3]);
        assert_eq!(matching("a/**/zarr.json", &keys), &keys[1..3]);
        assert_eq!(matching("**/b/**", &keys), ["a/b/zarr.json"]);
        assert_eq!(matching("**/a/**/zarr.json", &keys), &keys[1..3]);
        assert_eq!(matching("**", &keys), keys);
        assert_eq!(matching("**/**", &keys), keys);
    }

    #[test]
    fn glob_at_the_end_matches_what_is_below() {
        let keys = ["forecast", "forecast/a", "forecast/a/c/0", "forecasts/a"];
        assert_eq!(matching("forecast/**", &keys), &keys[1..3]);
        assert_eq!(matching("forecast", &keys), &keys[..1]);
    }

    #[test]
    fn glob_star_and_question_mark_stay_within_a_part() {
        let keys = ["a/c/0", "a/c/10", "a/c/0/1", "a/d/0", "é/c/0"];
        assert_eq!(matching("a/c/*", &keys), &keys[..2]);
        assert_eq!(matching("a/?/?", &keys), ["a/c/0", "a/d/0"]);
        assert_eq!(matching("?/c/*0", &keys), ["a/c/0", "a/c/10", "é/c/0"]);
        assert_eq!(matching("*/c/*/*", &keys), ["a/c/0/1"]);
        assert_eq!(matching("*", &keys), [""; 0]);
        assert_eq!(matching("*", &[".zarray"]), [".zarray"]);
        assert_eq!(
            matching("a**z", &["abcz", "a/z", "az", "azb"]),
            ["abcz", "az"]
        );
        assert_eq!(
            matching("*ab*ab", &["abab", "xabyabab", "ab"]),
            ["abab", "xabyabab"]
        );
    }

    #[test]
    fn glob_sets_match_their_characters() {
        assert_eq!(
            matching("t[0-9x]", &["t3", "tx", "ty", "t33"]),
            ["t3", "tx"]
        );
        assert_eq!(matching("t[!0-9]", &["t3", "ty"]), ["ty"]);
        assert_eq!(matching("t[]-]", &["t]", "t-", "tt"]), ["t]", "t-"]);
        assert_eq!(matching("t[a", &["t[a", "ta"]), ["t[a"]);
    }
}
