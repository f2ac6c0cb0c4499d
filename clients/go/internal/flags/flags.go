// Package flags holds the flags that the example commands share.
package flags

import (
	"flag"
	"fmt"
	"strconv"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Spec adds the flags of an image to a set, and returns what they fill in when it is parsed.
func Spec(set *flag.FlagSet) *hidreamv1.ImageSpec {
	spec := &hidreamv1.ImageSpec{}
	set.StringVar(&spec.Prompt, "prompt", "", "what to draw")
	set.Func("seed", "of the image (default: the server picks one)", optional(&spec.Seed))
	set.Func("width", "in pixels (default: the server's)", optional(&spec.Width))
	set.Func("height", "in pixels (default: the server's)", optional(&spec.Height))
	set.Func("steps", "denoising steps (default: the server's)", optional(&spec.NumInferenceSteps))
	return spec
}

// Model adds the flag of a model to a set, which fills in a field of the request when it is parsed.
func Model(set *flag.FlagSet, field **string) {
	set.Func("model", "which draws, a name of a live model (default: the server's)", func(text string) error {
		*field = &text
		return nil
	})
}

// optional makes a flag of a field that stays absent when the flag does.
func optional[T int32 | int64](field **T) func(string) error {
	return func(text string) error {
		number, err := strconv.ParseInt(text, 10, 64)
		value := T(number)
		if err != nil || int64(value) != number {
			return fmt.Errorf("not a whole number that fits")
		}
		*field = &value
		return nil
	}
}
