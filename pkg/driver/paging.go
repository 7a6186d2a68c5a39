package driver

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// page is one part of a listing that is sorted by a key. The token is the last key that was returned, so
// that what comes and goes between two calls shifts nothing.
type page struct {
	after string // keys up to this one have been returned
	max   int    // entries; 0: no limit
}

// newPage reads max_entries and starting_token; kind keeps the tokens of different listings apart. A token that
// this listing did not make is errToken, which tells the caller to start again.
func newPage(kind string, maxEntries int32, token string) (page, error) {
	if maxEntries < 0 {
		return page{}, invalid("max_entries is %d", maxEntries)
	}
	p := page{max: int(maxEntries)}
	if token == "" {
		return p, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	after, ok := strings.CutPrefix(string(raw), kind+":")
	if err != nil || !ok {
		return page{}, fmt.Errorf("%w: %q", errToken, token)
	}
	p.after = after
	return p, nil
}

// token returns the token of the page after the one that ends with key.
func token(kind, key string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(kind + ":" + key))
}

// full tells whether a page that has n entries takes no more.
func (p page) full(n int) bool { return p.max > 0 && n >= p.max }
